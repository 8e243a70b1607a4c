"""Memory of one training step, in bytes, by measures that are never mixed.

    saved        distinct storage that autograd keeps for backward; exact, any device
    model state  held between two steps: parameters, buffers, gradients and
                 optimizer state
    requested    what the tensors of a step asked CUDA's caching allocator for
    allocated    model state + the peak of the tensors of one step; on CUDA, blocks that
                 the allocator gave for the requests, which it rounds up
    active       allocated + freed blocks that another stream may still use
    reserved     memory that the allocator took from the driver for that
    pinned       page-locked host memory, for copies over the link
    host peak    the process's highest resident memory (`VmHWM`), all imports included

requested <= allocated <= active <= reserved. What NVML sees of the process, which also
has the CUDA context and its kernels, is measured by `processes`.

`trainable_device_bytes` is a part of these: the parameters that train, their gradients
and their optimizer state on the device, with the slots and routers of sparse adapters.

A step is that of training: forward, backward, clip, update, release of gradients. Steps
of the same shape must have run before, so that the optimizer state exists and caches
are filled.

On a CPU, `allocated` is computed from the profiler's allocation events, a sum that
starts at zero with the step. It is a deterministic function of the program, equal in
every process. It does not include the batch, which is allocated before the step, nor
memory held by libraries outside torch's allocator. If a step frees a block that was
allocated before it and is not part of the model state, the sum is too low by that
block; training steps free none.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from meft.page_lock import page_locked_bytes
from meft.sparse.adapter import sparse_adapters
from meft.sparse.row_parameter import rows_of
from meft.testing import saved_bytes
from meft_bench.child.backbones import quantised
from meft_bench.child.tasks.batches import Batch
from meft_bench.shared.nvml import Reading


def saved_by_forward(
    model: nn.Module, batch: Batch, loss_of: Callable[[Batch], Tensor]
) -> int:
    """Return the bytes that the forward `loss_of(batch)` saves for backward.

    Parameters, buffers and the batch are not counted: they are allocated in any case.

    Args:
        model: the model.
        batch: the inputs, on the device.
        loss_of: function that computes the loss.
    """
    there_anyway = [*model.parameters(), *model.buffers(), *batch.values()]
    with saved_bytes(there_anyway) as counter:
        loss = loss_of(batch)  # kept alive until counted
        held = counter.held
    del loss
    return held


def model_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters, buffers, gradients and optimizer state.

    Each storage is counted once. For sparse adapters, the memory on the device is
    counted, not rows in host memory.
    """
    return _bytes_of(_model_state(model, optimizer))


def bucket_bytes(replica: DistributedDataParallel) -> int:
    """Return the bytes in which gradients are averaged, held between two steps."""
    return sum(
        parameter.nbytes
        for parameter in replica._module_parameters
        if parameter.requires_grad
    )


def _model_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        if rows_of(parameter) is not None:
            continue
        yield from quantised.tensors_of(parameter)
        if parameter.grad is not None:
            yield from quantised.tensors_of(parameter.grad)
    for adapter in sparse_adapters(model).values():
        yield from adapter.rows.on_device()
    yield from _optimizer_state(optimizer)


def trainable_device_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]
) -> int:
    """Return the bytes on the device of what trains, at the end of a backward pass.

    These are parameters that train, their gradients when the optimizer is called, its
    state, and of sparse adapters the slots of rows with their gradients and the router,
    whether or not it trains. Where the rows and the state of an optimizer are in host
    memory, they are not counted, also on a CPU, whose memory stands for both.

    Args:
        model: the model.
        optimizer: the optimizer, which has its state.
        step: function that takes one step.
    """
    gradients = [0]
    trained = [p for p in model.parameters() if p.requires_grad and rows_of(p) is None]
    original = optimizer.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        held = (p.grad for p in trained if p.grad is not None)
        gradients.append(_bytes_of(held))
        return original(*args, **kwargs)

    optimizer.step = counting  # type: ignore[method-assign]
    try:
        step()
    finally:
        optimizer.step = original  # type: ignore[method-assign]
    return max(gradients) + _bytes_of(_trainable_state(model, optimizer, trained))


def _trainable_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]
) -> Iterator[Tensor]:
    yield from trained
    for adapter in sparse_adapters(model).values():
        yield from adapter.rows.on_device()
        if adapter.router is not None:
            yield adapter.router
    yield from _optimizer_state(optimizer)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield from quantised.tensors_of(value)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages."""
    storages = {
        # By the storage and not its address, which fake tensors do not have.
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
    }
    return sum(storages.values())


def cpu_step_peak_bytes(step: Callable[[], object]) -> int:
    """Return the peak of the CPU tensors allocated in `step()`, in bytes.

    Garbage collection is disabled during the step: what it frees, and when, depends on
    earlier work of the process.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaPeaks:
    """Peaks of one step on a CUDA device, in bytes.

    All but the last include the model state on the device.
    """

    peak_requested_bytes: Reading[int]
    peak_allocated_bytes: Reading[int]
    peak_active_bytes: Reading[int]
    peak_reserved_bytes: Reading[int]
    peak_pinned_bytes: Reading[int]


def cuda_step_peaks(step: Callable[[], object]) -> CudaPeaks:
    """Return the peaks of the current CUDA device, and of pinned memory, in `step()`.

    The cache is emptied first, so that reserved memory is that of this step and not of
    an earlier one.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if torch.cuda.host_memory_stats():
        torch.cuda.reset_peak_host_memory_stats()
    step()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return CudaPeaks(
        peak_requested_bytes=_counted(stats, "requested_bytes.all.peak"),
        peak_allocated_bytes=Reading(torch.cuda.max_memory_allocated()),
        peak_active_bytes=_counted(stats, "active_bytes.all.peak"),
        peak_reserved_bytes=Reading(torch.cuda.max_memory_reserved()),
        peak_pinned_bytes=pinned_bytes(torch.cuda.host_memory_stats()),
    )


def _counted(stats: Mapping[str, int], name: str) -> Reading[int]:
    # torch reports 0 for what the allocator cudaMallocAsync does not count.
    value = stats.get(name) or None
    reason = "torch's allocator does not count it: use the native one"
    return Reading(value, "" if value else reason)


def pinned_bytes(stats: Mapping[str, int]) -> Reading[int]:
    """Return the peak of page-locked host memory: torch's and that of sparse adapters.

    torch's includes the blocks that its allocator keeps for later requests, each
    rounded up to a power of two. Without any, it is 0.

    Args:
        stats: `torch.cuda.host_memory_stats()`.
    """
    # Older torch has `allocated_bytes` for what callers hold, and this for all blocks.
    for name in ("reserved_bytes.peak", "allocated_bytes.peak"):
        if name in stats:
            return Reading(stats[name] + page_locked_bytes())
    return Reading(
        None, "this version of torch does not count pinned memory: update it"
    )


def host_peak_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Return the highest resident memory of this process; None where not available."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) * 1024
    return None
