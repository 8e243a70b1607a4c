"""The caching allocator with the statistics that `torch.cuda.memory_stats` returns.

Each statistic has a current value, a peak, and the sums of all increases and of all
decreases, for both pools together and for each (c10/cuda/CUDACachingAllocator.cpp):

    allocation, allocated_bytes        blocks in use
    active, active_bytes               the same, as work of all streams is complete
    requested_bytes                    bytes of the requests, before rounding
    segment, reserved_bytes            memory obtained from the driver
    inactive_split, inactive_split_bytes   free blocks that are a part of a segment

Statistics of what is not modelled, such as oversized blocks, are 0, and so are, as in
torch, numbers of segments and of their free parts where segments are expandable.
"""

import copy
from dataclasses import dataclass
from typing import Any

from meft_bench.virtual.device.allocator import CachingAllocator, OutOfMemoryError
from meft_bench.virtual.device.blocks import Block, Pool

POOLS = ("all", "large_pool", "small_pool")
COUNTED = (
    *("allocation", "allocated_bytes", "requested_bytes"),
    *("segment", "reserved_bytes", "inactive_split", "inactive_split_bytes"),
)
SAME = {"active": "allocation", "active_bytes": "allocated_bytes"}
"""Statistics that equal others, as no block waits for the work of a stream."""
NOT_MODELLED = ("oversize_allocations", "oversize_segments")
PAIRS = {
    "allocation": "allocated_bytes",
    "inactive_split": "inactive_split_bytes",
}
"""Statistics of numbers of blocks, and those of their bytes."""


@dataclass(slots=True)
class Statistic:
    """One statistic."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    """Sum of all increases."""
    freed: int = 0
    """Sum of all decreases."""

    def add(self, change: int) -> None:
        """Add a change to the current value."""
        self.current += change
        self.peak = max(self.peak, self.current)
        if change > 0:
            self.allocated += change
        else:
            self.freed -= change

    def to_dict(self) -> dict[str, int]:
        """Return the values by the names that torch gives them."""
        return {
            "current": self.current,
            "peak": self.peak,
            "allocated": self.allocated,
            "freed": self.freed,
        }


class CountingAllocator(CachingAllocator):
    """A caching allocator that counts; see the module's docstring.

    Args:
        capacity_bytes: number of bytes that the driver can provide; None means
            unlimited.
        is_expandable: whether segments are expandable; None for what the environment
            says.
    """

    def __init__(
        self, capacity_bytes: int | None = None, is_expandable: bool | None = None
    ) -> None:
        super().__init__(capacity_bytes, is_expandable)
        self.num_out_of_memory = 0
        self._counts = {name: {p: Statistic() for p in POOLS} for name in COUNTED}
        self._requested: dict[int, int] = {}
        """Requested bytes of each block in use, by its address."""
        self._in_use: dict[int, Block] = {}

    def malloc(self, num_bytes: int, cuda_stream: int = 0) -> Block | None:
        """Allocate a block; see the base class."""
        try:
            block = super().malloc(num_bytes, cuda_stream)
        except OutOfMemoryError:
            self.num_out_of_memory += 1
            raise
        if block is None:
            return None
        if not self.is_expandable:
            self._count_splits(block)
        self._count(block, "allocation", 1, block.num_bytes)
        self._add("requested_bytes", block.pool, num_bytes)
        self._requested[block.address] = num_bytes
        self._in_use[block.address] = block
        return block

    def _count_splits(self, block: Block) -> None:
        """Count what taking a block changes of free parts of segments."""
        # Free neighbours are always merged, so a free one is the rest of a split.
        rest = block.after if block.after is not None and block.after.is_free else None
        beyond = block.after if rest is None else rest.after
        if block.before is not None or beyond is not None:
            size = block.num_bytes + (0 if rest is None else rest.num_bytes)
            self._count(block, "inactive_split", -1, -size)
        if rest is not None:
            self._count(block, "inactive_split", 1, rest.num_bytes)

    def free(self, block: Block | None) -> None:
        """Free a block that `malloc` returned."""
        if block is None:
            return
        self._count(block, "allocation", -1, -block.num_bytes)
        self._add("requested_bytes", block.pool, -self._requested.pop(block.address))
        del self._in_use[block.address]
        if self.is_expandable:
            super().free(block)
            return
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._count(block, "inactive_split", -1, -neighbour.num_bytes)
        super().free(block)
        if block.before is not None or block.after is not None:
            self._count(block, "inactive_split", 1, block.num_bytes)

    def reset_peaks(self) -> None:
        """Reset the peaks to the current values."""
        super().reset_peaks()
        for statistic in self._statistics():
            statistic.peak = statistic.current

    def reset_sums(self) -> None:
        """Reset the sums of increases and decreases, and the numbers of failures."""
        self.num_retries = self.num_out_of_memory = 0
        for statistic in self._statistics():
            statistic.allocated = statistic.freed = 0

    def statistics(self) -> dict[str, Any]:
        """Return all statistics, as `torch.cuda.memory_stats_as_nested_dict` does."""
        counts: dict[str, Any] = {
            name: {pool: one.to_dict() for pool, one in by_pool.items()}
            for name, by_pool in self._counts.items()
        }
        counts |= {name: copy.deepcopy(counts[other]) for name, other in SAME.items()}
        segments = self._counts["segment"]["all"]
        counts |= {name: Statistic().to_dict() for name in NOT_MODELLED}
        return counts | {
            "num_alloc_retries": self.num_retries,
            "num_ooms": self.num_out_of_memory,
            "num_sync_all_streams": 0,
            "num_device_alloc": segments.allocated,
            "num_device_free": segments.freed,
            "max_split_size": -1,
        }

    def segments(self) -> list[dict[str, Any]]:
        """Return every segment with its blocks, as `torch.cuda.memory_snapshot` does.

        Addresses are those of the model, which begin at 0.
        """
        free = [block for pool in self._pools.values() for *_, block in pool]
        first = {id(one): one for one in map(_first, [*free, *self._in_use.values()])}
        found = sorted(first.values(), key=lambda block: block.address)
        return [self._segment(block) for block in found]

    def _segment(self, first: Block) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        block: Block | None = first
        while block is not None:
            if not block.is_mapped:
                block = block.after
                continue
            requested = self._requested.get(block.address, 0)
            state = "inactive" if block.is_free else "active_allocated"
            blocks.append(
                {
                    "address": block.address,
                    "size": block.num_bytes,
                    "requested_size": 0 if block.is_free else requested,
                    "state": state,
                }
            )
            block = block.after
        used = sum(b["size"] for b in blocks if b["state"] != "inactive")
        return {
            "device": 0,
            "address": first.address,
            "total_size": sum(b["size"] for b in blocks),
            "allocated_size": used,
            "active_size": used,
            "requested_size": sum(b["requested_size"] for b in blocks),
            "stream": first.pool.cuda_stream,
            "segment_type": "small" if first.pool.is_small else "large",
            "is_expandable": self.is_expandable,
            "blocks": blocks,
        }

    def _new_segment(self, pool: Any, wanted: int) -> Block:
        block = super()._new_segment(pool, wanted)
        if not self.is_expandable:
            self._add("segment", pool, 1)
        return block

    def _release(self, block: Block) -> None:
        super()._release(block)
        self._add("segment", block.pool, -1)

    def _take(self, pool: Pool, num_bytes: int) -> None:
        super()._take(pool, num_bytes)
        self._add("reserved_bytes", pool, num_bytes)

    def _give_back(self, pool: Pool, num_bytes: int) -> None:
        super()._give_back(pool, num_bytes)
        self._add("reserved_bytes", pool, -num_bytes)

    def _count(self, block: Block, name: str, number: int, num_bytes: int) -> None:
        """Change a number of blocks and the bytes of them, in the pool of `block`."""
        self._add(name, block.pool, number)
        self._add(PAIRS[name], block.pool, num_bytes)

    def _add(self, name: str, pool: Pool, change: int) -> None:
        by_pool = self._counts[name]
        by_pool["all"].add(change)
        by_pool["small_pool" if pool.is_small else "large_pool"].add(change)

    def _statistics(self) -> list[Statistic]:
        return [one for by_pool in self._counts.values() for one in by_pool.values()]


def _first(block: Block) -> Block:
    while block.before is not None:
        block = block.before
    return block
