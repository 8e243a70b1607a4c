"""Blocks of memory in segments, and lists of free ones."""

from bisect import bisect_left, insort
from dataclasses import dataclass, field


class Pool(list[tuple[int, int, "Block"]]):
    """Free blocks by size and address; a CUDA stream has one for each class of sizes.

    Args:
        cuda_stream: number of the stream whose requests it serves; 0 is the default
            stream.
        is_small: whether it serves small requests.
    """

    def __init__(self, cuda_stream: int = 0, *, is_small: bool = False) -> None:
        super().__init__()
        self.cuda_stream = cuda_stream
        self.is_small = is_small


@dataclass(slots=True, eq=False)
class Block:
    """A contiguous part of a segment, in use or free."""

    num_bytes: int
    address: int
    pool: "Pool" = field(repr=False)
    is_free: bool = False
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)
    """Neighbours in the segment."""
    is_mapped: bool = True
    """Whether there is memory behind its addresses; else it is a hole, and not free."""

    @property
    def key(self) -> "tuple[int, int, Block]":
        """Sort key among the free blocks; no two blocks have the same address."""
        return (self.num_bytes, self.address, self)


def best_fit(pool: Pool, wanted: int) -> Block | None:
    """Take the smallest free block out of the pool that is large enough."""
    place = bisect_left(pool, wanted, key=lambda entry: entry[0])
    if place == len(pool):
        return None
    return pool.pop(place)[2]


def cut(block: Block, wanted: int) -> Block:
    """Keep `wanted` bytes in `block`; return the rest, which is in no list."""
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
    return rest


def split(block: Block, wanted: int) -> None:
    """Keep `wanted` bytes in `block` and make the rest a free block."""
    rest = cut(block, wanted)
    insort(rest.pool, rest.key)


def join(block: Block, neighbour: Block) -> None:
    """Merge a neighbour, which is in no list, into a block."""
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


def remove(block: Block) -> None:
    """Take a free block out of its pool."""
    place = bisect_left(block.pool, block.key[:2], key=lambda entry: entry[:2])
    assert block.pool[place][2] is block
    block.pool.pop(place)
