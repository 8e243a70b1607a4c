"""What the allocator makes of a trace, worked out by hand."""

from collections.abc import Sequence

import pytest
import torch

from meft_bench.virtual.device.allocator import MIB
from meft_bench.virtual.recording.replay import replay
from meft_bench.virtual.recording.trace import Storage, StorageEvent, Trace


def trace(*steps: tuple[str, int], elsewhere: Sequence[str] = ()) -> Trace:
    """One event per unit of time: `(name, MiB)` makes it, `(name, 0)` lets go of it.

    Without a name it is a kernel's workspace, which comes and goes.
    """
    storages: dict[str, Storage] = {}
    events: list[StorageEvent] = []
    for time, (name, size) in enumerate(steps, start=1):
        if not name:
            for is_birth in (True, False):
                events.append(StorageEvent(time, None, size * MIB, is_birth=is_birth))
            continue
        if size:
            storages[name] = Storage(
                index=len(storages),
                num_bytes=size * MIB,
                device="cpu" if name in elsewhere else "cuda",
                operator=f"make_{name}",
                module=f"model.{name}",
                phase="forward",
                step=0,
                shape=(size, MIB),
                dtype="uint8",
                born=time,
            )
        storage = storages[name]
        events.append(
            StorageEvent(time, storage.index, storage.num_bytes, is_birth=bool(size))
        )
    return Trace(
        storages=tuple(storages.values()),
        events=tuple(events),
        copies=(),
        round_bytes=512,
    )


def test_peaks_count_what_is_there_at_once() -> None:
    """A segment that is free serves again; the host's memory is not the device's."""
    found = replay(
        trace(("a", 30), ("a", 0), ("b", 20), ("c", 40), ("d", 50), elsewhere="d")
    )
    assert found.allocated_bytes == 60 * MIB
    assert found.reserved_bytes == 70 * MIB
    assert found.num_retries == 0


def test_kernels_take_theirs() -> None:
    found = replay(trace(("a", 30), ("", 12), ("b", 11)))
    assert found.allocated_bytes == (30 + 12) * MIB
    assert found.reserved_bytes == found.allocated_bytes


def test_from_the_start_on_the_cache_is_empty() -> None:
    """What was held before counts if it is still there."""
    steps = trace(("a", 30), ("b", 60), ("b", 0), ("c", 20))
    assert replay(steps).reserved_bytes == 90 * MIB
    found = replay(steps, start=4, emptied=(4,))
    assert (found.allocated_bytes, found.reserved_bytes) == (50 * MIB, 50 * MIB)
    found = replay(steps, start=5, emptied=(5,))
    assert (found.allocated_bytes, found.reserved_bytes) == (50 * MIB, 90 * MIB)


def test_peaks_start_anew_where_the_cache_is_kept() -> None:
    """As `torch.cuda.reset_peak_memory_stats` does."""
    steps = trace(("a", 30), ("b", 60), ("b", 0), ("c", 20))
    found = replay(steps, start=4)
    assert (found.allocated_bytes, found.reserved_bytes) == (50 * MIB, 90 * MIB)
    found = replay(steps, emptied=(4,))
    assert (found.allocated_bytes, found.reserved_bytes) == (90 * MIB, 90 * MIB)
    assert found.end_reserved_bytes == 50 * MIB


def test_what_was_kept_goes_back_before_memory_is_out() -> None:
    """30 MiB are free, but 40 in one piece are not."""
    steps = trace(("a", 30), ("a", 0), ("b", 40))
    assert replay(steps).reserved_bytes == 70 * MIB
    found = replay(steps, capacity_bytes=50 * MIB)
    assert found.reserved_bytes == 40 * MIB
    assert found.num_retries == 1


def test_out_of_memory_names_what_when_and_what_was_alive() -> None:
    steps = trace(("a", 30), ("b", 40), ("b", 0), ("a", 0))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        replay(steps, capacity_bytes=60 * MIB)
    message = str(caught.value)
    assert "a request of 40.0 MiB" in message
    assert "make_b of model.b in forward of step 0" in message
    assert "alive: forward 30.0 MiB" in message
