"""Expandable segments of PyTorch's CUDA allocator (`expandable_segments:True`).

Each pool has one range of addresses, to which memory is mapped as it is needed, 2 MiB
at a time in the small pool and 20 MiB in the large one
(c10/cuda/CUDACachingAllocator.cpp). The functions change what `CachingAllocator` does:

    growing     a request that no free block can serve takes the free block before a
                hole and maps what is missing after it, so that a segment grows in place
    best fit    a block before a hole counts with the hole's size, and is taken last
    splitting   a rest of 512 bytes or more becomes a block of its own
    emptying    the whole units inside free blocks are unmapped, and become holes
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from meft_bench.virtual.device.blocks import Block, Pool, cut, join, remove

MIB = 2**20
SMALL_UNIT_BYTES = 2 * MIB
LARGE_UNIT_BYTES = 20 * MIB
ADDRESS_BYTES = 2**50
"""Size of the range of addresses of a pool, which no request exhausts."""


@dataclass(slots=True)
class Range:
    """The addresses of one pool.

    Attributes:
        unit_bytes: memory is mapped in multiples of this.
        holes: the blocks that have no memory, by address.
    """

    unit_bytes: int
    holes: list[Block] = field(default_factory=list)

    def missing_bytes(self, wanted: int) -> int:
        """Return how much must be mapped to serve a request from the best place."""
        block: Block | None = self._place(wanted)
        missing = 0
        while block is not None and wanted > 0:
            if not block.is_mapped:
                missing += min(_up(wanted, self.unit_bytes), block.num_bytes)
            wanted -= block.num_bytes
            block = block.after
        return missing

    def grow(self, pool: Pool, wanted: int) -> Block:
        """Map memory for a request, and return its block, taken out of the pool.

        Args:
            pool: the free blocks.
            wanted: size of the request, which no free block has.
        """
        block = self._place(wanted)
        if not block.is_mapped:
            block = self._map(pool, block, wanted)
        while block.num_bytes < wanted:
            hole = block.after
            assert hole is not None
            block = self._map(pool, hole, wanted - block.num_bytes)
        remove(block)
        return block

    def unmap(self, pool: Pool) -> int:
        """Return the memory of whole units inside free blocks; return their bytes."""
        unmapped = 0
        for block in [entry[2] for entry in pool]:
            begin = _up(block.address, self.unit_bytes)
            end = (block.address + block.num_bytes) // self.unit_bytes * self.unit_bytes
            if end <= begin:
                continue
            remove(block)
            middle = _cut_at(block, begin) or block
            after = _cut_at(middle, end)
            for part in (None if middle is block else block, after):
                if part is not None:
                    insort(pool, part.key)
            middle.is_free, middle.is_mapped = False, False
            unmapped += middle.num_bytes
            self._add_hole(middle)
        return unmapped

    def _place(self, wanted: int) -> Block:
        """Return the first of free blocks and holes in a row that are large enough."""
        for hole in self.holes:
            before = hole.before
            first = before if before is not None and before.is_free else hole
            size, block = 0, first
            while size < wanted and (block.is_free or not block.is_mapped):
                size += block.num_bytes
                if block.after is None:
                    break
                block = block.after
            if size >= wanted:
                return first
        raise AssertionError("the range of addresses is exhausted")

    def _map(self, pool: Pool, hole: Block, wanted: int) -> Block:
        """Map the beginning of a hole; return the free block that it becomes."""
        self.holes.remove(hole)
        hole.is_mapped = True
        num_bytes = min(_up(wanted, self.unit_bytes), hole.num_bytes)
        if num_bytes < hole.num_bytes:
            rest = _cut_at(hole, hole.address + num_bytes)
            assert rest is not None
            rest.is_free, rest.is_mapped = False, False
            self._add_hole(rest)
        for neighbour in (hole.before, hole.after):
            if neighbour is not None and neighbour.is_free:
                remove(neighbour)
                join(hole, neighbour)
        hole.is_free = True
        insort(pool, hole.key)
        return hole

    def _add_hole(self, hole: Block) -> None:
        for neighbour in (hole.before, hole.after):
            if neighbour is not None and not neighbour.is_mapped:
                self.holes.remove(neighbour)
                join(hole, neighbour)
        insort(self.holes, hole, key=lambda block: block.address)


def next_range(pool: Pool, num_ranges: int) -> Range:
    """Return the range of addresses of a pool, without memory.

    Args:
        pool: the free blocks of the pool.
        num_ranges: number of ranges that exist, behind which it begins.
    """
    unit_bytes = SMALL_UNIT_BYTES if pool.is_small else LARGE_UNIT_BYTES
    # A multiple of either unit.
    address = num_ranges * 20 * ADDRESS_BYTES
    hole = Block(num_bytes=ADDRESS_BYTES, address=address, pool=pool, is_mapped=False)
    return Range(unit_bytes=unit_bytes, holes=[hole])


def best_fit(pool: Pool, wanted: int) -> Block | None:
    """Take the free block out of the pool that a request of `wanted` bytes gets."""
    place = bisect_left(pool, wanted, key=lambda entry: entry[0])
    if place == len(pool):
        return None
    while place + 1 < len(pool) and _size(pool[place + 1][2]) < _size(pool[place][2]):
        place += 1
    return pool.pop(place)[2]


def _size(block: Block) -> int:
    """Return the size to which a block can grow."""
    hole = block.after
    can_grow = hole is not None and not hole.is_mapped
    return block.num_bytes + (hole.num_bytes if can_grow and hole is not None else 0)


def _cut_at(block: Block, address: int) -> Block | None:
    """Cut a block in two at an address; return the second part, if there are two."""
    size = address - block.address
    return None if size in (0, block.num_bytes) else cut(block, size)


def _up(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple
