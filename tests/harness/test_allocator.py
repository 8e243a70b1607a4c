"""The model of the caching allocator, on traces that were worked out by hand."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.tiny import batch, cell, classifier
from meft_bench.child.training.steps import Stepper
from meft_bench.virtual.device.allocator import (
    MIB,
    CachingAllocator,
    OutOfMemoryError,
)
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.recording.snapshot import serve


def take(allocator: CachingAllocator, *sizes: int) -> list[Block]:
    blocks = [allocator.malloc(size) for size in sizes]
    assert all(block is not None for block in blocks)
    return [block for block in blocks if block is not None]


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # Made to measure, 2 MiB at a time. Up to 1 MiB too much stays with the block.
        (15 * MIB, 16 * MIB, 16 * MIB),
        (15 * MIB - 512, 15 * MIB - 512, 16 * MIB),
    ],
)
def test_one_request(num_bytes: int, allocated: int, reserved: int) -> None:
    """Rounding, the two pools, sizes of segments, and what is not split off."""
    allocator = CachingAllocator()
    allocator.malloc(num_bytes)
    assert allocator.allocated_bytes == allocated
    assert allocator.reserved_bytes == reserved


def test_the_smallest_free_block_that_is_large_enough_serves() -> None:
    """And the lowest of equals."""
    allocator = CachingAllocator()
    a, b, c, d, e = take(allocator, 4 * MIB, 2 * MIB, 6 * MIB, 2 * MIB, 6 * MIB)
    assert [x.address // MIB for x in (a, b, c, d, e)] == [0, 4, 6, 12, 14]
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(a)
    allocator.free(c)
    allocator.free(e)
    (small,) = take(allocator, 3 * MIB)
    assert small.address == 0  # of the block of 4; 1 MiB is left, and stays with it
    assert small.num_bytes == 4 * MIB
    (large,) = take(allocator, 6 * MIB)
    assert large.address == c.address


def test_neighbours_that_are_free_become_one() -> None:
    """In whatever order they are freed; a block in use keeps them apart."""
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        blocks = take(allocator, 4 * MIB, 6 * MIB, 10 * MIB - 512)
        for place in order[:2]:
            allocator.free(blocks[place])
        allocator.free(blocks[order[2]])
        take(allocator, 20 * MIB)
        assert allocator.reserved_bytes == 20 * MIB
    allocator = CachingAllocator()
    low, _, high = take(allocator, 6 * MIB, 6 * MIB, 8 * MIB)
    allocator.free(low)
    allocator.free(high)
    take(allocator, 9 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_pools_do_not_serve_one_another() -> None:
    allocator = CachingAllocator()
    (large,) = take(allocator, 2 * MIB)
    allocator.free(large)
    take(allocator, 512)
    assert allocator.reserved_bytes == 22 * MIB


def test_free_segments_go_back_before_memory_runs_out() -> None:
    """One in use in part does not, so a second request finds no room."""
    allocator = CachingAllocator(capacity_bytes=64 * MIB)
    whole, part = take(allocator, 30 * MIB, 6 * MIB)
    allocator.free(whole)
    assert allocator.reserved_bytes == 50 * MIB
    take(allocator, 32 * MIB)
    assert (allocator.num_retries, allocator.reserved_bytes) == (1, 52 * MIB)
    assert allocator.peak_reserved_bytes == 52 * MIB
    with pytest.raises(OutOfMemoryError, match=r"no room for a segment of 16\.0 MiB"):
        allocator.malloc(15 * MIB)
    assert allocator.allocated_bytes == 38 * MIB
    allocator.free(part)
    take(allocator, 20 * MIB)  # the segment of 20 is whole again, and serves
    assert allocator.reserved_bytes == 52 * MIB


@given(
    sizes=st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=60),
    seed=st.integers(0, 10),
)
def test_blocks_never_overlap_and_nothing_is_lost(sizes: list[int], seed: int) -> None:
    """Whatever is allocated and freed."""
    rng = random.Random(seed)
    allocator = CachingAllocator()
    live: list[Block] = []
    for size in sizes:
        live += take(allocator, size)
        assert live[-1].num_bytes >= size
        if rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        spans = sorted((b.address, b.address + b.num_bytes) for b in live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert allocator.allocated_bytes == sum(b.num_bytes for b in live)
        assert allocator.reserved_bytes >= allocator.allocated_bytes
    for block in live:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_real_history_is_served_in_its_order() -> None:
    """By hand: two segments of 20 MiB for 4 MiB, of which one serves twice."""

    def entry(action: str, address: int, size: int) -> dict[str, object]:
        return {"action": action, "addr": address, "size": size, "stream": 0}

    history = [
        entry("segment_alloc", 0, 20 * MIB),
        entry("alloc", 1, 9 * MIB),
        entry("alloc", 2, 9 * MIB),
        entry("alloc", 3, 4 * MIB),  # 2 MiB are left of the first segment
        entry("free_requested", 2, 9 * MIB),
        entry("free_completed", 2, 9 * MIB),
        entry("alloc", 4, 9 * MIB),
        entry("free_completed", 99, MIB),  # from before the history
    ]
    found = serve(history)
    assert found.reserved_bytes == 40 * MIB
    assert found.allocated_bytes == 22 * MIB
    assert serve(history, start_bytes=30 * MIB).allocated_bytes == 52 * MIB


@pytest.mark.gpu
def test_the_model_reserves_what_the_real_allocator_does() -> None:
    """Of a training step, from its recorded history; within a hundredth."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start_bytes = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(context=None, max_entries=1_000_000)
    try:
        stepper = Stepper(classifier().cuda(), cell(device="cuda"))
        stepper.model.train()
        for _ in range(2):
            stepper.step([batch()], 1e-3)
        torch.cuda.synchronize()
        (history,) = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    found = serve(history, start_bytes)
    real = torch.cuda.max_memory_reserved()
    assert found.allocated_bytes == torch.cuda.max_memory_allocated()
    assert found.reserved_bytes == pytest.approx(real, rel=0.01)
