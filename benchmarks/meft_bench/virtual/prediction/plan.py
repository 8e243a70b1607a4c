"""Predict the memory of one step of a cell on a GPU, with a breakdown.

Two steps run under the ledger; the second, for which all state exists, is reported.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meft.errors import MeftError
from meft_bench.child import backbones
from meft_bench.child.backbones import any_family, classifier
from meft_bench.child.tasks.batches import refuse_padded_images
from meft_bench.child.training import prepare
from meft_bench.shared import lengths, quantisations
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import MODEL_TYPES, PEFT
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.device.gpu import Gpu
from meft_bench.virtual.emulation import ranks
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction import any_model
from meft_bench.virtual.prediction.predict import Ready, ready
from meft_bench.virtual.prediction.roofline import roofline
from meft_bench.virtual.recording import views
from meft_bench.virtual.recording.breakdown import breakdown
from meft_bench.virtual.recording.replay import held_by, replay
from meft_bench.virtual.recording.trace import Peak, Storage, Trace

NUM_LABELS = 2
"""Number of classes of a model of a family that is not known."""
NUM_ALIVE = 12
"""Number of storages that are listed individually."""
HALF = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Prediction for one method; operations and copies are those of one step.

    Of code of the user, they are those of all its steps.

    Attributes:
        method: name of the method; "" for code of the user.
        verdict: `fits`, `tight` (fits without the margin), `too large`, or `unknown`.
        message: the reason, if the verdict is `too large` or `unknown`: the request
            that failed, when it was made, and what was alive.
        allocated_bytes: peak of the bytes that live tensors hold.
        reserved_bytes: peak of what the allocator holds, with all that it has kept from
            earlier steps.
        process_bytes: what `nvidia-smi` shows: reserved bytes, and those of the driver.
        needed_bytes: the same if nothing had been kept before the step.
        by_kind: bytes at the peak, by kind; `libraries` is the memory that libraries
            for matrix products never free.
        unattributed_bytes: allocated bytes of no kind: blocks are larger than their
            requests.
        by_phase: peak of each phase: forward, backward, recompute, update.
        by_block: bytes at the peak, by block of the model.
        by_operator: bytes at the peak, by the operator that allocated them, largest
            first, without workspaces.
        alive: the largest storages at the peak, and where each was allocated.
        saved_by_block: bytes that each block saves for backward.
        timeline: time in operators, phase, and bytes of each kind, a row per change;
            None unless requested.
        memory_breakdown: what the peak consists of, as records keep it; None if nothing
            ran.
        where: location of the peak: phase, operator, module.
        num_trainable_parameters: number of parameters that are trained.
        num_flops: floating-point operations of products and attention.
        h2d_bytes: bytes copied from the host; None where host and GPU cannot be
            distinguished.
        d2h_bytes: bytes copied to the host, likewise.
        moved: the copied bytes by direction, phase and block.
        bytes_touched: bytes of the device that operators read and write.
        host_bytes_touched: bytes of host memory that operators, copies and AdamW on the
            host read and write; None where host and GPU cannot be distinguished.
        seconds_at_least: the larger of the times of arithmetic and of memory access at
            the vendor's rates.
        phases: least seconds of forward, backward and update, by what takes them
            (`roofline`).
        step_seconds_at_least: their sum, with the copies over the link.
        seq_len: tokens of the batch that needs most; None for code of the user.
        padding: whether that batch has padding, `none` or `some`; `any` if both need
            the same, "" for code of the user.
        task: `synthetic` for a classifier, `synthetic-lm` for a language model; "" for
            code of the user.
        num_steps: number of steps of which operations and copies are sums.
        prediction: how the numbers came about, and what was assumed.
    """

    method: str
    verdict: str
    message: str = ""
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    needed_bytes: int | None = None
    by_kind: dict[str, int] | None = None
    unattributed_bytes: int | None = None
    by_phase: dict[str, int] | None = None
    by_block: dict[str, int] | None = None
    by_operator: dict[str, int] | None = None
    alive: list[dict[str, Any]] | None = None
    saved_by_block: dict[str, int] | None = None
    timeline: list[dict[str, Any]] | None = None
    memory_breakdown: dict[str, Any] | None = None
    where: str = ""
    num_trainable_parameters: int | None = None
    num_flops: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    moved: list[dict[str, Any]] | None = None
    bytes_touched: int | None = None
    host_bytes_touched: int | None = None
    seconds_at_least: float | None = None
    phases: list[dict[str, Any]] | None = None
    step_seconds_at_least: float | None = None
    seq_len: int | None = None
    padding: str = ""
    task: str = ""
    num_steps: int = 1
    prediction: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return dataclasses.asdict(self)


def plan(
    cell: Cell,
    source: Source,
    margin: float,
    *,
    timeline: bool = False,
    seq: Sequence[str] = (),
    paddings: Sequence[str] = (),
) -> MemoryPlan:
    """Return the plan of a cell on its virtual GPU; errors become a verdict.

    A step is run for each length, and the one that needs most is returned, but for what
    the allocator holds after all of them.

    Args:
        cell: the cell to plan.
        source: origin of its config.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        timeline: whether the plan includes every change of memory during the step.
        seq: lengths of the batches, as `meft_bench.shared.lengths` reads them; none for
            the cell's own.
        paddings: which of `none` and `some` to plan, of which that one is returned that
            needs most; none for the cell's own.

    Returns:
        The plan of the cell.
    """
    first, *others = paddings or [cell.padding]
    cell = dataclasses.replace(cell, padding=first)
    try:
        cell = cell if seq else _with_image_tokens(cell, source)
        steps = lengths.of_batches(seq, cell.batch_size) or [cell.seq_len]
        with _ready(cell, source) as it:
            found, more = _plan(it, margin, timeline, steps, others)
        if more is not None:  # in an allocator of its own
            cell = dataclasses.replace(cell, padding=more)
            with _ready(cell, source) as it:
                found, _ = _plan(it, margin, timeline, steps, [])
        return _with_lengths(found, seq, steps)
    except torch.OutOfMemoryError as error:
        return MemoryPlan(method=cell.method, verdict="too large", message=str(error))
    except (MissingError, MeftError, ValueError, NotImplementedError) as error:
        message = " ".join(str(error).split())
        return MemoryPlan(method=cell.method, verdict="unknown", message=message)
    except Exception as error:  # otherwise the plans of other methods would be lost
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return MemoryPlan(method=cell.method, verdict="unknown", message=message)


def _with_image_tokens(cell: Cell, source: Source) -> Cell:
    """Return the cell; if its model reads images, with the tokens of one."""
    config, _ = backbones.load_config(cell, source, any_type=True)
    is_known = config.model_type in MODEL_TYPES and not cell.method.startswith(PEFT)
    shape = backbones.image_shape(config) if is_known else None
    if shape is None:
        return cell
    return dataclasses.replace(cell, seq_len=classifier.num_image_tokens(config, shape))


def _ready(cell: Cell, source: Source) -> contextlib.AbstractContextManager[Ready]:
    """Prepare a cell by the methods of sweeps, or as any model of transformers."""
    config, _ = backbones.load_config(cell, source, any_type=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "its config has a `quantization_config`, and quantised weights are not "
            "modelled by it: remove it from config.json, and name one of "
            f"{', '.join(quantisations.TABLE)} as `--weights-dtype` to plan these"
        )
    is_known = config.model_type in MODEL_TYPES and not cell.method.startswith(PEFT)
    task = cell.task or any_family.task_of(config.model_type)
    cell = dataclasses.replace(cell, task=task)
    if is_known:
        return ready(cell, source)
    num_labels = None if task == "synthetic-lm" else NUM_LABELS
    return any_model.ready(cell, config, num_labels)


def _with_lengths(
    plan: MemoryPlan, seq: Sequence[str], steps: Sequence[int]
) -> MemoryPlan:
    """Return a plan that says which lengths a distribution was taken to have."""
    if not lengths.is_distribution(seq):
        return plan
    shown = ", ".join(map(str, steps))
    assumed = f"assumed: batches of {shown} tokens, for rows of {' '.join(seq)}"
    return dataclasses.replace(plan, prediction=f"{plan.prediction}; {assumed}")


def _plan(
    it: Ready,
    margin: float,
    timeline: bool,
    steps: Sequence[int],
    others: Sequence[str],
) -> tuple[MemoryPlan, str | None]:
    """Return the plan of a cell, and another padding of its batches that needs more.

    Args:
        it: the cell, with the padding that is planned.
        margin: as for `plan`.
        timeline: as for `plan`.
        steps: the numbers of tokens of the batches.
        others: other paddings.
    """
    has_mask = "attention_mask" in it.batches_of(steps[0])[0]
    if not has_mask:
        if not others:
            refuse_padded_images(it.cell)
        others = []
    it.stepper.model.train()
    held: list[object] = []
    it.stepper.model.register_forward_hook(_holding(held))
    it.stepper.step(it.batches_of(steps[0]), learning_rate=1e-3)

    def observed(length: int) -> MemoryPlan:
        it.device.reset_peaks()
        it.stepper.step(it.batches_of(length), learning_rate=1e-3)
        one = observe(
            it.device,
            margin=margin,
            flops_per_second=_flops_per_second(it.cell.dtype, it.device.gpu),
            timeline=timeline,
        )
        padding = it.cell.padding if has_mask else "none"
        return dataclasses.replace(one, seq_len=length, padding=padding)

    found = [observed(length) for length in steps]
    worst = max(found, key=_need)
    count = prepare.count(it.stepper.model)["num_trainable_parameters"]
    plan = dataclasses.replace(
        worst,
        method=it.cell.method,
        # The allocator keeps what any of the steps needed.
        reserved_bytes=max(one.reserved_bytes or 0 for one in found),
        process_bytes=max(one.process_bytes or 0 for one in found),
        num_trainable_parameters=count,
        prediction="; ".join([it.how, *assumptions(it.device, it.selections)]),
        task=it.cell.task,
    )
    for other in others:
        held.clear()
        it.device.has_padding = other != "none"
        one = observed(max(steps))
        if _need(one)[:2] > _need(worst)[:2]:
            return plan, other
        if one.allocated_bytes == worst.allocated_bytes:
            plan = dataclasses.replace(plan, padding="any")
    return plan, None


def _holding(held: list[object]) -> Callable[..., None]:
    """Return a hook that holds a model's output until the next one replaces it.

    So does the variable of an ordinary loop in which the result of `model(**batch)` is
    put: logits live on in backward and in the optimizer's step.

    Args:
        held: a list, in which the output is put.
    """

    def hook(_model: Any, _args: Any, output: object) -> None:
        held[:] = [output]

    return hook


def _need(plan: MemoryPlan) -> tuple[bool, int, int]:
    """Return a key by which plans are sorted: the one that needs most is the last."""
    is_too_large = plan.verdict == "too large"
    return is_too_large, plan.allocated_bytes or 0, plan.needed_bytes or 0


def observe(
    device: VirtualGpu,
    *,
    margin: float,
    flops_per_second: float,
    timeline: bool = False,
) -> MemoryPlan:
    """Return what has been recorded since the peaks of a device were last reset.

    Args:
        device: the virtual GPU, with a ledger.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        flops_per_second: rate of the arithmetic.
        timeline: whether to include every change of memory.

    Returns:
        The plan, without a method.
    """
    gpu, ledger, since = device.gpu, device.ledger, device.since
    assert ledger is not None
    trace = ledger.trace()
    message = device.memory.error
    held = (
        # What it would take without a limit.
        replay(trace, start=since.time) if message else held_by(device.memory.allocator)
    )
    # The least with which it runs: the allocator can give back what it has kept.
    least = replay(trace, start=since.time, emptied=(since.time,))
    least_bytes = min(least.reserved_bytes, held.reserved_bytes)
    needed = least_bytes + gpu.context_bytes
    peak = trace.peak(start=since.time)
    kinds = peak.by_kind
    directions = Counter[str]()
    for copy in views.copies_after(trace, since.time):
        directions[copy.direction] += copy.num_bytes
    flops, touched = ledger.flops - since.flops, ledger.touched - since.touched
    of_host = ledger.touched_by_host - since.touched_by_host
    copied = _copied(trace, since.time)
    phases = roofline(gpu, flops_per_second, flops, touched, copied, of_host)
    return MemoryPlan(
        method="",
        verdict="too large" if message else _verdict(needed, gpu, margin),
        message=message,
        allocated_bytes=held.allocated_bytes,
        reserved_bytes=held.reserved_bytes,
        process_bytes=held.reserved_bytes + gpu.context_bytes,
        needed_bytes=needed,
        by_kind=kinds,
        unattributed_bytes=held.allocated_bytes - sum(kinds.values()),
        by_phase=views.peak_by_phase(trace, start=since.time),
        by_block=views.at_peak(trace, peak, "block"),
        by_operator=views.at_peak(trace, peak, "operator"),
        alive=[_listed(trace, storage) for storage in peak.alive[:NUM_ALIVE]],
        saved_by_block=views.saved_by_block(trace, max(ledger.step - 1, 0)),
        timeline=_moments(trace, since.time) if timeline else None,
        memory_breakdown=breakdown(trace, since.time),
        where=_where(trace, peak),
        num_flops=flops.total(),
        h2d_bytes=directions["h2d"] if trace.has_link else None,
        d2h_bytes=directions["d2h"] if trace.has_link else None,
        moved=_moved(trace, since.time) if trace.has_link else None,
        bytes_touched=touched.total(),
        host_bytes_touched=of_host.total() if trace.has_link else None,
        seconds_at_least=max(
            flops.total() / flops_per_second,
            touched.total() / gpu.memory_bytes_per_second,
        ),
        phases=[each.to_json() for each in phases],
        step_seconds_at_least=sum(each.seconds for each in phases),
    )


def assumptions(device: VirtualGpu, selections: Mapping[str, int]) -> list[str]:
    """Return what was assumed of values that were read while code ran.

    Args:
        device: the virtual GPU.
        selections: number of selections whose size was assumed, by operator.
    """
    found = []
    if device.num_ranks > 1:
        found.append(ranks.in_words(device.num_ranks))
    if count := sum(selections.values()):
        found.append(f"assumed: {count} selections by a mask keep all elements")
    if count := device.mode.conditions.num_read:
        found.append(f"assumed: {count} conditions that were read hold")
    return found


def _verdict(needed_bytes: int, gpu: Gpu, margin: float) -> str:
    return "fits" if needed_bytes <= (1 - margin) * gpu.memory_bytes else "tight"


def _listed(trace: Trace, storage: Storage) -> dict[str, Any]:
    fields = dataclasses.asdict(storage)
    names = ("num_bytes", "shape", "dtype", "operator", "module", "phase", "step")
    return {name: fields[name] for name in names} | {"kind": trace.kind_of(storage)}


def _moments(trace: Trace, started: int) -> list[dict[str, Any]]:
    return [
        {"time": moment.time, "phase": moment.phase} | moment.by_name
        for moment in views.timeline(trace, start=started)
    ]


def _moved(trace: Trace, started: int) -> list[dict[str, Any]]:
    return [
        {"direction": direction, "phase": phase, "block": block, "num_bytes": size}
        for (direction, phase, block), size in views.moved(trace, started).items()
    ]


def _copied(trace: Trace, started: int) -> Counter[tuple[str, str]]:
    """Return the bytes between host and device by direction and phase."""
    found: Counter[tuple[str, str]] = Counter()
    for copy in views.copies_after(trace, started):
        found[copy.direction, copy.phase] += copy.num_bytes
    return found


def _where(trace: Trace, peak: Peak) -> str:
    """Return the location of the last allocation before the peak; "" for none."""
    if not peak.alive:
        return ""
    last = max(peak.alive, key=lambda s: (s.born, s.index))
    place = f" of {last.module}" if last.module else ""
    return f"{last.phase}: {last.operator}{place}"


def _flops_per_second(dtype: str, gpu: Gpu) -> float:
    if dtype in HALF and (dtype == "fp16" or gpu.computes_in_bf16):
        return gpu.half_flops_per_second
    is_tf32 = torch.backends.cuda.matmul.allow_tf32
    return gpu.tf32_flops_per_second if is_tf32 else gpu.fp32_flops_per_second
