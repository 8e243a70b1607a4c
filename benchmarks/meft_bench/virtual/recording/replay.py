"""Replay a trace on the model of the caching allocator, with or without a capacity."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from meft_bench.virtual.device.allocator import (
    MIB,
    CachingAllocator,
    OutOfMemoryError,
)
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.recording.live_memory import message_of
from meft_bench.virtual.recording.trace import StorageEvent, Trace

NUM_SHOWN = 5

_Mark = tuple[int, Callable[[CachingAllocator], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Peaks from a given time on, and the bytes held at the end."""

    allocated_bytes: int
    reserved_bytes: int
    end_allocated_bytes: int
    end_reserved_bytes: int
    num_retries: int


def held_by(allocator: CachingAllocator) -> Replay:
    """Return the counters of an allocator that has served all requests."""
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
    """Replay all allocations of a trace on its accelerator, in order.

    Args:
        trace: the recorded allocations.
        capacity_bytes: number of bytes that the driver can provide; None means
            unlimited.
        start: time from which on peaks are counted, in operators.
        emptied: times at which the cache is emptied, in operators.

    Returns:
        Peaks and final values, in bytes.

    Raises:
        torch.OutOfMemoryError: there is no room; the message names the request and the
            storages that are alive.
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
                blocks[event.storage] = allocator.malloc(
                    event.num_bytes, event.cuda_stream
                )
            else:
                allocator.free(blocks.pop(event.storage))
        for _, act in reversed(marks):
            act(allocator)
    except OutOfMemoryError as error:
        assert event is not None
        text = message_of(error, describe(trace, event, blocks))
        raise torch.OutOfMemoryError(text) from None
    return held_by(allocator)


def _marks(start: int, emptied: Collection[int]) -> list[_Mark]:
    """Return the actions on the allocator between events, the last first."""
    marks: list[_Mark] = [(time, CachingAllocator.empty_cache) for time in emptied]
    # At equal times, the cache is emptied first.
    marks.append((start, CachingAllocator.reset_peaks))
    return sorted(marks, key=lambda mark: mark[0])[::-1]


def _is_on_device(trace: Trace, event: StorageEvent) -> bool:
    assert event.storage is not None
    return trace.storages[event.storage].device == trace.accelerator


def describe(
    trace: Trace, event: StorageEvent, blocks: dict[int | None, Block | None]
) -> str:
    """Return which request an event is, and the largest kinds of memory in use.

    Args:
        trace: the recording.
        event: an allocation.
        blocks: the blocks in use, by storage.
    """
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
