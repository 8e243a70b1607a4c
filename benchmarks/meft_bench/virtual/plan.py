"""What one step of a cell takes on a GPU, and why it takes so much.

Two steps run under the ledger; the second, which has all state, is told of.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from meft_bench import measure
from meft_bench.cell import Cell
from meft_bench.source import MissingError, Source
from meft_bench.virtual.gpu import Gpu, workspace_bytes
from meft_bench.virtual.predict import HOW, Ready, ready
from meft_bench.virtual.replay import replay
from meft_bench.virtual.trace import Peak, Trace

MARGIN = 0.05
"""Of the GPU's memory, left free by what is said to fit."""
HALF = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Of one method; bytes and rates of a step, all predicted."""

    method: str
    verdict: str
    """`fits`, `tight` (fits without the margin), `too large`, or `unknown`."""
    message: str = ""
    """Why, where it is neither of the first two."""
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    needed_bytes: int | None = None
    """Reserved, and what the driver takes beside it."""
    by_kind: dict[str, int] | None = None
    """Of the moment at which most was held; adds up to the ledger's peak."""
    where: str = ""
    """That moment: phase, module, operator."""
    num_trainable_parameters: int | None = None
    num_flops: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    seconds_at_least: float | None = None
    """What arithmetic or memory alone would take at the vendor's rates."""
    prediction: str = HOW

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def plan(cell: Cell, source: Source) -> Plan:
    """The plan of a cell on the virtual GPU that is its device; raises nothing."""
    try:
        with ready(cell, source) as it:
            return _plan(it)
    except torch.OutOfMemoryError as error:
        return Plan(method=cell.method, verdict="too large", message=str(error))
    except (MissingError, ValueError, NotImplementedError) as error:
        return Plan(method=cell.method, verdict="unknown", message=str(error))


def _plan(it: Ready) -> Plan:
    gpu = it.device.gpu
    ledger = it.ledger
    it.stepper.model.train()
    it.stepper.step(it.batches, learning_rate=1e-3)
    started, num_flops = ledger.time, ledger.num_flops
    bytes_touched, ledger.step = ledger.bytes_touched, 1
    it.stepper.step(it.batches, learning_rate=1e-3)
    num_flops = ledger.num_flops - num_flops
    bytes_touched = ledger.bytes_touched - bytes_touched
    trace = ledger.trace()
    # Without a limit, so that what does not fit can be told in full.
    memory = replay(trace, workspace_bytes=workspace_bytes(gpu), start=started)
    needed = memory.reserved_bytes + gpu.context_bytes
    peak = trace.peak("cuda", started)
    moved = Counter[str]()
    for copy in trace.copies:
        if copy.time > started:
            moved[copy.direction] += copy.num_bytes
    count = measure.count(it.stepper.model)
    return Plan(
        method=it.cell.method,
        verdict=_verdict(needed, gpu),
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        needed_bytes=needed,
        by_kind=peak.by_kind,
        where=_where(trace, peak),
        num_trainable_parameters=count["num_trainable_parameters"],
        num_flops=num_flops,
        h2d_bytes=moved["h2d"],
        d2h_bytes=moved["d2h"],
        seconds_at_least=max(
            num_flops / _flops_per_second(it.cell, gpu),
            bytes_touched / gpu.memory_bytes_per_second,
        ),
    )


def _verdict(needed_bytes: int, gpu: Gpu) -> str:
    if needed_bytes > gpu.memory_bytes:
        return "too large"
    return "fits" if needed_bytes <= (1 - MARGIN) * gpu.memory_bytes else "tight"


def _where(trace: Trace, peak: Peak) -> str:
    """The last thing that was made before most was held."""
    last = max(peak.alive, key=lambda s: (s.born, s.index))
    place = f" of {last.module}" if last.module else ""
    return f"{last.phase}: {last.operator}{place}"


def _flops_per_second(cell: Cell, gpu: Gpu) -> float:
    if cell.dtype in HALF:
        return gpu.half_flops_per_second
    is_tf32 = torch.backends.cuda.matmul.allow_tf32
    return gpu.tf32_flops_per_second if is_tf32 else gpu.fp32_flops_per_second
