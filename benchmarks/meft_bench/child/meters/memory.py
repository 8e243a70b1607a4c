"""Memory of one training step, in bytes, by five yardsticks that are never mixed.

    saved        distinct storage that autograd keeps for backward; exact, any device
    resting      parameters, buffers, gradients and optimizer state between two steps
    allocated    resting + the most that tensors of one step held at once
    reserved     what CUDA's caching allocator took from the driver for that
    host peak    the process's highest resident memory (`VmHWM`), all imports in

A step is what training does: forward, backward, clip, update, gradients let go. Steps
of the same shape must have run before, so that the optimizer state exists and caches
are filled.

On a CPU, `allocated` comes from the profiler's allocation events, a sum from zero at
the start of the step. It is a pure function of the program, the same in every process.
Two things it misses: the batch itself, which is there before the step, and memory held
by libraries outside torch's allocator. If a step frees a block that was born before it
and does not rest, the sum is too low by that block; training steps free none.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from meft.sparse.convert import sparse_adapters
from meft.sparse.row_parameter import rows_of
from meft.testing import saved_bytes
from meft_bench.child.tasks.batches import Batch


def saved_by_forward(
    model: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor]
) -> int:
    """Bytes that the forward `loss_of(batch)` keeps for backward.

    Parameters, buffers and the batch do not count: they are there anyway.
    """
    there_anyway = [*model.parameters(), *model.buffers(), *batch.values()]
    with saved_bytes(there_anyway) as counter:
        loss = loss_of(batch)  # kept alive until counted
        total = counter.total
    del loss
    return total


def resting_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers, gradients and optimizer state, each once.

    Of sparse adapters, what they hold on the device: not rows in host memory.
    """
    storages = {
        # By the storage and not its address, which fake tensors do not have.
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in _resting(model, optimizer)
    }
    return sum(storages.values())


def _resting(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        if rows_of(parameter) is not None:
            continue
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for adapter in sparse_adapters(model).values():
        yield from adapter.rows.on_device()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def cpu_step_peak_bytes(step: Callable[[], object]) -> int:
    """The most that CPU tensors born in `step()` held at once.

    Garbage collection is off during the step: what it frees, and when, depends on what
    the process did before.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(
            activities=activities, profile_memory=True
        ) as profile:
            step()
    finally:
        gc.enable()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    held = peak = 0
    events = [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cuda_step_peak_bytes(step: Callable[[], object]) -> tuple[int, int]:
    """(allocated, reserved) peaks of the current CUDA device during `step()`.

    Both include what rests on the device. The cache is emptied first, so that reserved
    memory is what this step needs and not what an earlier one took.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def host_peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """This process's highest resident memory so far; None where Linux does not tell."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) * 1024
    return None
