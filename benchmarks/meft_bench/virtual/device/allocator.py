"""Compute what PyTorch's CUDA allocator reserves for a trace of allocations.

This is a model of the native caching allocator (c10/cuda/CUDACachingAllocator.cpp) with
its default settings, one stream and no expandable segments:

    rounding     the size of a request is rounded up to a multiple of 512 bytes
    pools        requests of up to 1 MiB are served from the small pool, larger ones
                 from the large pool
    segments     the small pool obtains memory from the driver 2 MiB at a time; the
                 large pool obtains 20 MiB for requests below 10 MiB, otherwise a
                 multiple of 2 MiB
    best fit     the smallest free block that is large enough is used; among blocks of
                 equal size, the one with the lowest address
    splitting    the unused rest of a block becomes a block of its own; in the large
                 pool only if it is more than 1 MiB
    coalescing   free neighbours in one segment are merged into one block
    retry        when the driver has no memory left, segments that are entirely free
                 are returned to it, and the request is made once more

`allocated_bytes` counts whole blocks, as `torch.cuda.memory_allocated` does, so it
includes the part of a block that is larger than the request and is not split off.
"""

import os
from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20
ROUND_BYTES = 512
SMALL_BYTES = MIB
"""Largest request of the small pool; the large pool splits off only larger rests."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
LARGE_REQUEST_BYTES = 10 * MIB
"""Smallest request for which a segment is allocated in the size of the request."""


SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables of the environment with settings of PyTorch's allocator."""


def ignored_settings() -> str:
    """Return a note on settings in the environment, which this model ignores.

    Returns:
        The note; "" if none is set.
    """
    found = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    if not found:
        return ""
    return f"not modelled: {', '.join(found)}; the allocator's defaults are used"


class OutOfMemoryError(RuntimeError):
    """Raised when the device has no room for a segment after free ones are returned."""


@dataclass(slots=True, eq=False)
class Block:
    """A contiguous part of a segment, in use or free."""

    num_bytes: int
    address: int
    pool: "list[tuple[int, int, Block]]" = field(repr=False)
    is_free: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)
    """Neighbours in the segment."""

    @property
    def key(self) -> "tuple[int, int, Block]":
        """Sort key among the free blocks; no two blocks have the same address."""
        return (self.num_bytes, self.address, self)


def round_up(num_bytes: int, multiple: int = ROUND_BYTES) -> int:
    """Return the smallest multiple of `multiple` that is not below `num_bytes`."""
    return -(-num_bytes // multiple) * multiple


class CachingAllocator:
    """Model of PyTorch's caching allocator, with current values and peaks in bytes.

    Args:
        capacity_bytes: number of bytes that the driver can provide; None means
            unlimited.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._small: list[tuple[int, int, Block]] = []
        self._large: list[tuple[int, int, Block]] = []
        self._next_address = 0

    def malloc(self, num_bytes: int) -> Block | None:
        """Allocate a block; return None for a request of 0 bytes.

        Args:
            num_bytes: size of the request, before rounding.

        Raises:
            OutOfMemoryError: there is no room.
        """
        if num_bytes == 0:
            return None
        wanted = round_up(num_bytes)
        pool = self._small if wanted <= SMALL_BYTES else self._large
        block = _best_fit(pool, wanted) or self._new_segment(pool, wanted)
        rest = block.num_bytes - wanted
        least = ROUND_BYTES if pool is self._small else SMALL_BYTES + 1
        if rest >= least:
            _split(block, wanted)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Free a block that `malloc` returned."""
        if block is None:
            return
        assert not block.is_free
        self.allocated_bytes -= block.num_bytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                _remove(neighbour)
                _join(block, neighbour)
        block.is_free = True
        insort(block.pool, block.key)

    def empty_cache(self) -> None:
        """Return segments that are entirely free to the driver."""
        for pool in (self._small, self._large):
            whole = [b for _, _, b in pool if b.before is None and b.after is None]
            for block in whole:
                _remove(block)
                self._release(block)

    def reset_peaks(self) -> None:
        """Reset the peaks to the current values."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _release(self, block: Block) -> None:
        """Return a segment, which is one free block, to the driver."""
        self.reserved_bytes -= block.num_bytes

    def _new_segment(self, pool: "list[tuple[int, int, Block]]", wanted: int) -> Block:
        if pool is self._small:
            num_bytes = SMALL_SEGMENT_BYTES
        elif wanted < LARGE_REQUEST_BYTES:
            num_bytes = LARGE_SEGMENT_BYTES
        else:
            num_bytes = round_up(wanted, 2 * MIB)
        if not self._has_room(num_bytes):
            self.num_retries += 1
            self.empty_cache()
        if not self._has_room(num_bytes):
            raise OutOfMemoryError(
                f"no room for a segment of {num_bytes / MIB:,.1f} MiB (a request of "
                f"{wanted / MIB:,.1f} MiB): {self.allocated_bytes / MIB:,.1f} MiB are "
                f"allocated and {self.reserved_bytes / MIB:,.1f} MiB reserved of "
                f"{(self.capacity_bytes or 0) / MIB:,.1f} MiB"
            )
        block = Block(num_bytes=num_bytes, address=self._next_address, pool=pool)
        # Segments are not neighbours, although their addresses are consecutive.
        self._next_address += num_bytes
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _has_room(self, num_bytes: int) -> bool:
        return (
            self.capacity_bytes is None
            or self.reserved_bytes + num_bytes <= self.capacity_bytes
        )


def _best_fit(pool: "list[tuple[int, int, Block]]", wanted: int) -> Block | None:
    place = bisect_left(pool, wanted, key=lambda entry: entry[0])
    if place == len(pool):
        return None
    return pool.pop(place)[2]


def _split(block: Block, wanted: int) -> None:
    """Keep `wanted` bytes in `block` and make the rest a free block."""
    rest = Block(
        num_bytes=block.num_bytes - wanted,
        address=block.address + wanted,
        pool=block.pool,
        is_free=True,
        before=block,
        after=block.after,
    )
    if rest.after is not None:
        rest.after.before = rest
    block.after, block.num_bytes = rest, wanted
    insort(rest.pool, rest.key)


def _join(block: Block, neighbour: Block) -> None:
    if neighbour is block.before:
        block.address = neighbour.address
        block.before = neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
    block.num_bytes += neighbour.num_bytes


def _remove(block: Block) -> None:
    place = bisect_left(block.pool, block.key[:2], key=lambda entry: entry[:2])
    assert block.pool[place][2] is block
    block.pool.pop(place)
