"""The memory of a step as torch's profiler sees it, for code that is compiled.

Compiled code allocates without operators, so that a `Ledger`, which intercepts them,
does not see its storages. The profiler has an event for each request to the allocator,
inside the events of what made the request:

    phase      `backward` inside a node of autograd, `update` inside a step of an
               optimizer or after the last backward, else `forward`
    operator   the innermost operator, or the function that runs a compiled graph
    module     `compiled code`, or none: the profiler knows no modules

Dtypes and shapes are unknown; a shape is the number of bytes. What is there between two
steps is known by module and kind, as the ledger sees it.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._profiler import _EventType

from meft_bench.virtual.device.allocator import ROUND_BYTES
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Storage, StorageEvent, Trace

COMPILED = "compiled code"
_GRAPH = "## Call CompiledFxGraph"
"""Beginning of the event of a graph, which ends in a digest of its code."""
_REGIONS = ("Torch-Compiled Region", "CompiledFunction")
_NODE = "autograd::engine::evaluate_function"
_UPDATE = "Optimizer.step"


class _Request(NamedTuple):
    """One request to the allocator."""

    time: int
    address: int
    num_bytes: int
    """Size; below 0 for a free."""
    inside: tuple[str, ...]
    """Names of the events around it, from the outside."""


def trace_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], object],
    device: str,
) -> tuple[Trace, int]:
    """Take a step, and return its memory with the time at which it began.

    Args:
        model: the model.
        optimizer: its optimizer.
        step: function that takes the step.
        device: type of the device whose memory is recorded, `cpu` or `cuda`.
    """
    # A CPU has no allocator that rounds.
    round_bytes = 1 if device == "cpu" else ROUND_BYTES
    with Ledger(accelerator=device, round_bytes=round_bytes) as ledger:
        ledger.watch(model, optimizer)
        if device == "cuda":
            ledger.add_unattributed(torch.cuda.memory_allocated())
        start = ledger.mark()
    before = ledger.trace()
    storages, events = [*before.storages], [*before.events]
    alive: dict[int, Storage] = {}
    requests = _requests(step, device)
    last_backward = max(
        (n for n, one in enumerate(requests) if _is_backward(one)), default=-1
    )
    for time, request in enumerate(requests, start=start + 1):
        if request.num_bytes < 0:
            # What was allocated before the step is not in the recording.
            if (storage := alive.pop(request.address, None)) is not None:
                storage.died = time
                size = storage.num_bytes
                events.append(StorageEvent(time, storage.index, size, is_birth=False))
            continue
        is_after = time - start - 1 > last_backward
        storage = _storage(len(storages), time, request, device, is_after)
        storages.append(storage)
        alive[request.address] = storage
        size = storage.num_bytes
        events.append(StorageEvent(time, storage.index, size, is_birth=True))
    whole = dataclasses.replace(
        before, storages=tuple(storages), events=tuple(events), copies=()
    )
    return whole, start


def _requests(step: Callable[[], object], device: str) -> list[_Request]:
    """Return the requests of a step to the allocator of a device, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    gc.disable()  # what it frees, and when, depends on earlier work of the process
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
    found = _inside(results.experimental_event_tree(), device, ())
    return sorted(found, key=lambda one: one.time)


def _inside(
    events: list[Any], device: str, names: tuple[str, ...]
) -> Iterator[_Request]:
    for event in events:
        if event.tag == _EventType.Allocation:
            its = event.extra_fields
            if its.device.type == device and its.alloc_size:
                time = event.start_time_ns
                yield _Request(time, its.ptr, its.alloc_size, names)
        yield from _inside(event.children, device, (*names, event.name))


def _storage(
    index: int, time: int, request: _Request, device: str, is_after: bool
) -> Storage:
    names = [name for name in request.inside if not name.startswith(_GRAPH)]
    is_compiled = any(name.startswith(_REGIONS) for name in request.inside)
    return Storage(
        index=index,
        num_bytes=request.num_bytes,
        device=device,
        operator=names[-1].removeprefix(f"{_NODE}: ") if names else "",
        module=COMPILED if is_compiled else "",
        phase=_phase(request, is_after),
        step=0,
        shape=(request.num_bytes,),
        dtype="",
        born=time,
    )


def _phase(request: _Request, is_after: bool) -> str:
    if any(name.startswith(_UPDATE) for name in request.inside):
        return "update"
    if _is_backward(request):
        return "backward"
    return "update" if is_after else "forward"


def _is_backward(request: _Request) -> bool:
    return any(name.startswith(_NODE) for name in request.inside)
