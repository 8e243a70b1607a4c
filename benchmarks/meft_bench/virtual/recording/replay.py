"""What the caching allocator makes of a trace; or that memory runs out, and where."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from meft_bench.virtual.device.allocator import (
    MIB,
    Block,
    CachingAllocator,
    OutOfMemoryError,
)
from meft_bench.virtual.recording.trace import Event, Trace

NUM_SHOWN = 5

_Mark = tuple[int, Callable[[CachingAllocator], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """The most that was held from some moment on, and what is held at the end."""

    allocated_bytes: int
    reserved_bytes: int
    end_allocated_bytes: int
    end_reserved_bytes: int
    num_retries: int


def held_by(allocator: CachingAllocator) -> Replay:
    """What an allocator that has served everything has counted."""
    return Replay(
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        end_allocated_bytes=allocator.allocated_bytes,
        end_reserved_bytes=allocator.reserved_bytes,
        num_retries=allocator.num_retries,
    )


def replay(
    trace: Trace,
    *,
    capacity_bytes: int | None = None,
    start: int = 0,
    emptied: Collection[int] = (),
) -> Replay:
    """Serve all allocations of a trace on its accelerator, in order.

    Args:
        trace: what was allocated and freed.
        capacity_bytes: what the driver has to give; None for without end.
        start: the time from which on peaks are taken.
        emptied: the times at which the cache is emptied.

    Raises:
        torch.OutOfMemoryError: there is no room; says for what, and what is alive.
    """
    allocator = CachingAllocator(capacity_bytes)
    blocks: dict[int | None, Block | None] = {}
    event = None
    try:
        marks = _marks(start, emptied)
        for event in trace.events:
            while marks and event.time >= marks[-1][0]:
                marks.pop()[1](allocator)
            if event.storage is not None and not _is_on_device(trace, event):
                continue
            if event.is_birth:
                blocks[event.storage] = allocator.malloc(event.num_bytes)
            else:
                allocator.free(blocks.pop(event.storage))
        for _, act in reversed(marks):
            act(allocator)
    except OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory, predicted: {error}. {_where(trace, event, blocks)}"
        ) from None
    return held_by(allocator)


def replay_in_full(
    trace: Trace, *, capacity_bytes: int, start: int = 0
) -> tuple[Replay, str]:
    """As `replay`, and what there was no room for: "" if there was for everything.

    The cache is emptied at `start`.

    A trace for which there is no room is served once more without a limit, so that all
    it needs can be told.
    """
    try:
        held = replay(
            trace,
            capacity_bytes=capacity_bytes,
            start=start,
            emptied=(start,),
        )
    except torch.OutOfMemoryError as error:
        held = replay(trace, start=start, emptied=(start,))
        return held, str(error)
    return held, ""


def _marks(start: int, emptied: Collection[int]) -> list[_Mark]:
    """What happens to the allocator between two events, the last first."""
    marks: list[_Mark] = [(time, CachingAllocator.empty_cache) for time in emptied]
    # Of the same time, after the cache is emptied.
    marks.append((start, CachingAllocator.reset_peaks))
    return sorted(marks, key=lambda mark: mark[0])[::-1]


def _is_on_device(trace: Trace, event: Event) -> bool:
    assert event.storage is not None
    return trace.storages[event.storage].device == trace.accelerator


def _where(
    trace: Trace, event: Event | None, blocks: dict[int | None, Block | None]
) -> str:
    """For what there was no room, and the largest things that are alive."""
    assert event is not None
    if event.storage is None:
        wanted = "a kernel's workspace"
    else:
        one = trace.storages[event.storage]
        place = one.module or "no module"
        wanted = f"{one.operator} of {place} in {one.phase} of step {one.step}"
    kinds: dict[str, int] = {}
    for index in blocks:
        if index is not None:
            storage = trace.storages[index]
            kind = trace.kind_of(storage)
            kinds[kind] = kinds.get(kind, 0) + storage.num_bytes
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:NUM_SHOWN]
    alive = ", ".join(f"{kind} {size / MIB:,.1f} MiB" for kind, size in largest)
    return f"Wanted for {wanted}; alive: {alive}"
