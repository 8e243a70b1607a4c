"""Run one cell on a virtual GPU with the same model, method, step and meters.

    load task and config -> empty model on the virtual GPU -> apply the method
    -> probe memory, with the steps of training

There are no values, so nothing is trained or scored; weights are not read, and of the
examples only the shape is used.
"""

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from meft_bench.child import backbones
from meft_bench.child.backbones import any_family
from meft_bench.child.measuring import probes
from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.child.tasks.batches import Batch, refuse_padded_images
from meft_bench.child.tasks.loading import load_task
from meft_bench.child.training import execution, prepare
from meft_bench.child.training.steps import Stepper
from meft_bench.shared import configs
from meft_bench.shared.cell import Cell
from meft_bench.shared.methods import TABLE
from meft_bench.shared.registry import HAVE_ROWS, PEFT
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.device.allocator import settings_in_words
from meft_bench.virtual.emulation import assumed_activation, quantised_layers
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.recording.breakdown import breakdown
from meft_bench.virtual.recording.ledger import Ledger

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A cell that is ready to step, with its device and ledger."""

    cell: Cell
    device: VirtualGpu
    ledger: Ledger
    stepper: Stepper
    num_blocks: int
    """Number of blocks of the model before the method changes it."""
    batches_of: Callable[[int], list[Batch]]
    """Function from a length in tokens to the batches of one step."""
    how: str
    """How the numbers of the cell were predicted."""
    origins: dict[str, str | None]
    """Fields of `Environment`."""
    selections: Counter[str] = dataclasses.field(default_factory=Counter)
    """Number of selections whose size was assumed, by operator."""


@contextlib.contextmanager
def ready(cell: Cell, source: Source) -> Iterator[Ready]:
    """Prepare `cell` on its virtual GPU, which exists while the context is active.

    Raises:
        MissingError: the backbone's config or the task is not available, or the method
            needs information that this build of torch does not have.
        ValueError: the config, the method and the shape are incompatible.
    """
    task = load_task(cell, source)
    config, origin = backbones.load_config(cell, source, any_type=True)
    num_labels = prepare.num_labels_of(task)
    origins = {
        "data_origin": f"shapes only; {task.origin}",
        "weights_origin": origin,
        "weights_sha256": configs.digest(cell.backbone),
    }
    if not any_family.is_known(config):
        from meft_bench.virtual.prediction import any_model  # which needs this module

        with any_model.ready(cell, config, num_labels, origins) as it:
            yield it
        return
    device = VirtualGpu(gpu.find(gpu.name_in(cell.device)))
    device.has_padding = cell.padding != "none"
    # For other methods, a size that depends on values raises an error.
    has_rows = cell.method in HAVE_ROWS
    sizes = (
        assumed_activation.rows(cell.active_fraction, device.add_host_traffic)
        if has_rows
        else contextlib.nullcontext()
    )
    with (
        device,
        sizes,
        execution.attention(cell),
        contextlib.ExitStack() as stack,
    ):
        how = _how(cell, device)
        on_it = dataclasses.replace(cell, device=device.backend.device)
        backbone, ledger, words = stack.enter_context(
            recorded(
                device,
                on_it,
                lambda: backbones.from_config(config, origin, on_it, num_labels),
                lambda backbone: backbone.model,
            )
        )
        num_blocks = len(backbones.blocks_of(backbone.model))
        stepper = prepare.apply_method(backbone, on_it)
        ledger.watch(stepper.model, stepper.optimizer)
        yield Ready(
            cell=cell,
            device=device,
            ledger=ledger,
            stepper=stepper,
            num_blocks=num_blocks,
            batches_of=lambda length: _batches(
                dataclasses.replace(cell, seq_len=length),
                backbones.image_shape(config),
                num_labels,
            ),
            how="; ".join([how, *words]),
            origins=origins,
        )


@contextlib.contextmanager
def recorded(
    device: VirtualGpu,
    cell: Cell,
    make: Callable[[], Made],
    model_of: Callable[[Made], Any],
) -> Iterator[tuple[Made, Ledger, list[str]]]:
    """Make a model whose weights a ledger records, quantised if the cell says so.

    The ledger begins after weights were quantised: who loads such a model quantises
    each weight when it is read, and never holds all of them in another dtype.

    Args:
        device: the virtual GPU, which is active.
        cell: the cell that the model is for.
        make: makes the model, or something that has it.
        model_of: returns the model of that.

    Yields:
        What was made, the ledger, and what to say of quantised weights.
    """
    if not cell.is_quantised:
        with device.new_ledger() as ledger:
            yield make(), ledger, []
        return
    from meft_bench.child.methods import peft_config  # peft takes seconds
    from meft_bench.virtual.emulation import quantised_lora

    if cell.method.startswith(PEFT):
        peft_config.refuse_quantised(cell)
    made = make()
    model = model_of(made)
    words = quantised_layers.quantise(model, cell)
    with quantised_lora.known_to_peft(), device.new_ledger() as ledger:
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.see(tensor.detach())
        yield made, ledger, [words]


def predict(cell: Cell, source: Source, partial: PartialResult) -> None:
    """Add the predicted memory of a step of `cell` to `partial`.

    Args:
        cell: the cell to predict.
        source: origin of its config and task.
        partial: the partial result to update.

    Raises:
        MissingError, ValueError: see `ready`.
        torch.OutOfMemoryError: the GPU has too little memory.
    """
    partial.environment |= {
        "num_threads": torch.get_num_threads(),
        "prediction": gpu.find(gpu.name_in(cell.device)).basis,
    }
    with ready(cell, source) as it:
        model = it.stepper.model
        partial.environment |= {
            "device_name": it.device.gpu.name,
            "prediction": it.how,
            **it.origins,
        }
        partial.note(
            **prepare.count(model),
            num_blocks=it.num_blocks,
        )
        # No kernel is tuned and no library warms up: all steps after the first are
        # equal.
        batches = it.batches_of(cell.seq_len)
        if "pixel_values" in batches[0]:
            refuse_padded_images(cell)
        probes.probe_memory(it.stepper, it.cell, batches, partial, num_first_steps=1)
        start = it.ledger.mark()
        it.stepper.step(batches, learning_rate=0.0)
        partial.memory_breakdown = breakdown(it.ledger.trace(), start)
        probes.probe_rows(it.stepper, batches, itertools.repeat(batches), partial)
        probes.probe_transfers(it.stepper, batches, partial)


def _how(cell: Cell, device: VirtualGpu) -> str:
    words = [device.backend.how, device.gpu.basis]
    words += [note] if (note := settings_in_words()) else []
    refuse_without_host(cell, device)
    if cell.method in HAVE_ROWS:
        share = f"{cell.active_fraction:.0%} of a block's neurons"
        words.append(f"assumed: a batch activates {share}")
    return "; ".join(words)


def refuse_without_host(cell: Cell, device: VirtualGpu) -> None:
    """Refuse a cell that keeps tensors in host memory where that is not known.

    Raises:
        MissingError: this build of torch cannot tell the host from a virtual GPU.
    """
    method = TABLE.get(cell.method)
    on_host = {
        "rows": cell.method in HAVE_ROWS,
        "checkpoints": cell.method.endswith("checkpointing-offload"),
        "lost bits": cell.side_buffer == "host"
        and method is not None
        and "side_buffer" in method.options,
    }
    kept = [what for what, is_kept in on_host.items() if is_kept]
    if kept and device.backend.device == "cpu":
        raise MissingError(
            f"method {cell.method!r} keeps {kept[0]} on the host, which this build of "
            f"torch ({torch.__version__}) cannot tell from a virtual GPU: run it "
            "on `cpu`, where every byte is counted, or take another build"
        )


def _batches(
    cell: Cell, image_shape: tuple[int, int, int] | None, num_labels: int | None
) -> list[Batch]:
    """Return the batches of the largest step of the cell, with arbitrary contents.

    The shapes are those of `meft_bench.child.tasks.batches.full_batches`, which reads
    every token.
    """
    shape = (cell.batch_size, cell.seq_len)
    labels_shape = shape if num_labels is None else shape[:1]
    batches: list[Batch] = []
    for _ in range(cell.accumulation):
        is_number = num_labels == 1
        dtype = torch.float32 if is_number else torch.long
        labels = torch.zeros(labels_shape, dtype=dtype)
        if image_shape is not None:
            pixels = torch.zeros(cell.batch_size, *image_shape)
            batches.append({"pixel_values": pixels, "labels": labels})
            continue
        ids = torch.zeros(shape, dtype=torch.long)
        batches.append(
            {
                "input_ids": ids,
                "token_type_ids": torch.zeros_like(ids),
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
            }
        )
    return batches
