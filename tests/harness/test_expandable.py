"""Expandable segments of the caching allocator, on traces worked out by hand."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meft_bench
from meft_bench.virtual.device.allocator import (
    MIB,
    OutOfMemoryError,
    settings_in_words,
)
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.device.memory_stats import CountingAllocator

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"


def expandable(capacity_bytes: int | None = None) -> CountingAllocator:
    return CountingAllocator(capacity_bytes, is_expandable=True)


def take(allocator: CountingAllocator, *sizes: int) -> list[Block]:
    blocks = [allocator.malloc(size) for size in sizes]
    assert all(block is not None for block in blocks)
    return [block for block in blocks if block is not None]


@pytest.mark.parametrize(
    ("num_bytes", "allocated", "reserved"),
    [
        *((1, 512, 2 * MIB), (MIB, MIB, 2 * MIB), (MIB + 1, MIB + 512, 20 * MIB)),
        # 20 MiB at a time, and all that is left is split off.
        *((15 * MIB, 15 * MIB, 20 * MIB), (30 * MIB, 30 * MIB, 40 * MIB)),
    ],
)
def test_one_request(num_bytes: int, allocated: int, reserved: int) -> None:
    allocator = expandable()
    allocator.malloc(num_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (
        allocated,
        reserved,
    )


def test_a_segment_grows_in_place() -> None:
    """30 MiB are free at the end; 50 need one unit more, not a segment of 50."""
    allocator = expandable()
    low, high = take(allocator, 30 * MIB, 30 * MIB)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.free(high)
    (larger,) = take(allocator, 50 * MIB)
    assert larger.address == low.address + 30 * MIB
    assert allocator.reserved_bytes == 80 * MIB
    plain = CountingAllocator(is_expandable=False)
    low, high = take(plain, 30 * MIB, 30 * MIB)
    plain.free(high)
    take(plain, 50 * MIB)
    assert plain.reserved_bytes == 110 * MIB


def test_a_block_before_a_hole_is_taken_last() -> None:
    """10 MiB fit at the end, into 20 that can grow, and between two blocks."""
    allocator = expandable()
    first, _, third = take(allocator, 30 * MIB, 30 * MIB, 20 * MIB)
    allocator.free(first)
    allocator.free(third)
    (small,) = take(allocator, 10 * MIB)
    assert small.address == first.address


def test_emptying_returns_whole_units_inside_free_blocks() -> None:
    """A free block of 50 MiB from 10 on has 20 to 60: two units; then holes serve."""
    allocator = expandable()
    _, middle, last = take(allocator, 10 * MIB, 50 * MIB, 20 * MIB)
    allocator.free(middle)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    (small,) = take(allocator, 8 * MIB)
    assert small.address == middle.address
    (inside,) = take(allocator, 30 * MIB)  # 2 are left before the hole
    assert inside.address == middle.address + 8 * MIB
    assert allocator.reserved_bytes == 80 * MIB
    assert inside.address + inside.num_bytes <= last.address


def test_without_room_free_units_go_back_first() -> None:
    allocator = expandable(capacity_bytes=100 * MIB)
    whole, _ = take(allocator, 60 * MIB, 20 * MIB)
    allocator.free(whole)
    take(allocator, 2 * MIB)
    assert allocator.num_retries == 0
    with pytest.raises(OutOfMemoryError, match="no room"):
        allocator.malloc(90 * MIB)
    take(allocator, 58 * MIB)
    assert allocator.reserved_bytes <= 100 * MIB


@given(
    sizes=st.lists(st.integers(1, 60 * MIB), min_size=1, max_size=60),
    seed=st.integers(0, 10),
)
def test_blocks_never_overlap_and_nothing_is_lost(sizes: list[int], seed: int) -> None:
    """Whatever is allocated, freed and returned; what is reserved is what is mapped."""
    rng = random.Random(seed)
    allocator = expandable()
    live: list[Block] = []
    for size in sizes:
        live += take(allocator, size)
        assert live[-1].num_bytes >= size
        if rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        if rng.random() < 0.2:
            allocator.empty_cache()
        spans = sorted((b.address, b.address + b.num_bytes) for b in live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert allocator.allocated_bytes == sum(b.num_bytes for b in live)
        segments = allocator.segments()
        assert allocator.reserved_bytes == sum(s["total_size"] for s in segments)
        counted = allocator.statistics()["reserved_bytes"]["all"]["current"]
        assert counted == allocator.reserved_bytes
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not modelled is said; settings of both variables count."""
    assert settings_in_words() == ""
    assert not CountingAllocator().is_expandable
    monkeypatch.setenv(VARIABLE, "expandable_segments:True,max_split_size_mb:128")
    assert CountingAllocator().is_expandable
    words = settings_in_words()
    assert words.startswith("assumed: expandable segments, as the environment says; ")
    assert words.endswith("not modelled: max_split_size_mb:128 of the allocator")
    monkeypatch.setenv(VARIABLE, "expandable_segments:False")
    assert settings_in_words() == ""


def test_steps_of_different_lengths_reserve_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In `virtual_gpu`, whose plan says that segments are expandable."""
    import torch

    reserved = {}
    for value in ("False", "True"):
        monkeypatch.setenv(VARIABLE, f"expandable_segments:{value}")
        with meft_bench.virtual_gpu("A100-40GB") as memory:
            layer = torch.nn.Linear(2048, 2048, device="cuda")
            for rows in (3000, 5000, 7000, 9000, 11000):
                layer(torch.empty(rows, 2048, device="cuda")).relu().sum().backward()
        plan = memory.plan()
        reserved[value] = plan.reserved_bytes or 0
        assert ("assumed: expandable segments" in plan.prediction) == (value == "True")
    assert reserved["True"] < 0.8 * reserved["False"]
