"""Compute what PyTorch's CUDA allocator reserves for a trace of allocations.

This is a model of the native caching allocator (c10/cuda/CUDACachingAllocator.cpp) with
its default settings; `expandable` has what differs with `expandable_segments:True`:

    rounding     the size of a request is rounded up to a multiple of 512 bytes
    pools        requests of up to 1 MiB are served from the small pool, larger ones
                 from the large pool; each CUDA stream has pools of its own, and
                 never gets memory that another stream has freed
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
from bisect import insort

from meft_bench.virtual.device import blocks, expandable
from meft_bench.virtual.device.blocks import Block, Pool, join, remove, split

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


EXPANDABLE = "expandable_segments"
"""The setting that is modelled."""
EXPANDS = "assumed: expandable segments, as the environment says"


def settings() -> dict[str, str]:
    """Return the settings of the environment, as `NAME:VALUE,NAME:VALUE` gives them."""
    found: dict[str, str] = {}
    for variable in SETTINGS:
        for text in os.environ.get(variable, "").split(","):
            name, _, value = text.strip().partition(":")
            if name:
                found[name] = value
    return found


def has_expandable_segments() -> bool:
    """Return whether the environment asks for expandable segments."""
    return settings().get(EXPANDABLE, "").casefold() == "true"


def settings_in_words() -> str:
    """Return a note on the settings of the environment; "" if none has an effect."""
    words = [EXPANDS] if has_expandable_segments() else []
    others = [f"{n}:{v}" for n, v in settings().items() if n != EXPANDABLE]
    if others:
        words.append(f"not modelled: {', '.join(others)} of the allocator")
    return "; ".join(words)


class OutOfMemoryError(RuntimeError):
    """Raised when the device has no room for a segment after free ones are returned."""


def round_up(num_bytes: int, multiple: int = ROUND_BYTES) -> int:
    """Return the smallest multiple of `multiple` that is not below `num_bytes`."""
    return -(-num_bytes // multiple) * multiple


class CachingAllocator:
    """Model of PyTorch's caching allocator, with current values and peaks in bytes.

    Args:
        capacity_bytes: number of bytes that the driver can provide; None means
            unlimited.
        is_expandable: whether segments are expandable; None for what the environment
            says.
    """

    def __init__(
        self, capacity_bytes: int | None = None, is_expandable: bool | None = None
    ) -> None:
        self.capacity_bytes = capacity_bytes
        if is_expandable is None:
            is_expandable = has_expandable_segments()
        self.is_expandable = is_expandable
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[tuple[int, bool], Pool] = {}
        """By CUDA stream and class of sizes."""
        self._next_address = 0
        self._ranges: dict[int, expandable.Range] = {}
        """The addresses of each pool, by its identity, if segments are expandable."""

    def malloc(self, num_bytes: int, cuda_stream: int = 0) -> Block | None:
        """Allocate a block; return None for a request of 0 bytes.

        Args:
            num_bytes: size of the request, before rounding.
            cuda_stream: number of the stream that is current; 0 is the default stream.

        Raises:
            OutOfMemoryError: there is no room.
        """
        if num_bytes == 0:
            return None
        wanted = round_up(num_bytes)
        pool = self._pool_of(cuda_stream, is_small=wanted <= SMALL_BYTES)
        fit = expandable.best_fit if self.is_expandable else blocks.best_fit
        block = fit(pool, wanted) or self._new_segment(pool, wanted)
        rest = block.num_bytes - wanted
        splits_all = self.is_expandable or pool.is_small
        least = ROUND_BYTES if splits_all else SMALL_BYTES + 1
        if rest >= least:
            split(block, wanted)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def _pool_of(self, cuda_stream: int, *, is_small: bool) -> Pool:
        """Return the pool of a CUDA stream for requests of a class of sizes."""
        key = (cuda_stream, is_small)
        if key not in self._pools:
            pool = self._pools[key] = Pool(cuda_stream, is_small=is_small)
            if self.is_expandable:
                self._ranges[id(pool)] = expandable.next_range(pool, len(self._ranges))
        return self._pools[key]

    def free(self, block: Block | None) -> None:
        """Free a block that `malloc` returned, to the pool from which it came."""
        if block is None:
            return
        assert not block.is_free
        self.allocated_bytes -= block.num_bytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                remove(neighbour)
                join(block, neighbour)
        block.is_free = True
        insort(block.pool, block.key)

    def empty_cache(self) -> None:
        """Return segments that are entirely free to the driver."""
        for pool in self._pools.values():
            if self.is_expandable:
                self._give_back(pool, self._ranges[id(pool)].unmap(pool))
                continue
            whole = [b for _, _, b in pool if b.before is None and b.after is None]
            for block in whole:
                remove(block)
                self._release(block)

    def reset_peaks(self) -> None:
        """Reset the peaks to the current values."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _release(self, block: Block) -> None:
        """Return a segment, which is one free block, to the driver."""
        self._give_back(block.pool, block.num_bytes)

    def _give_back(self, pool: Pool, num_bytes: int) -> None:
        """Count memory of a pool that is returned to the driver."""
        self.reserved_bytes -= num_bytes

    def _take(self, pool: Pool, num_bytes: int) -> None:
        """Count memory of a pool that is obtained from the driver."""
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _new_segment(self, pool: Pool, wanted: int) -> Block:
        if self.is_expandable:
            num_bytes = self._ranges[id(pool)].missing_bytes(wanted)
        elif pool.is_small:
            num_bytes = SMALL_SEGMENT_BYTES
        elif wanted < LARGE_REQUEST_BYTES:
            num_bytes = LARGE_SEGMENT_BYTES
        else:
            num_bytes = round_up(wanted, 2 * MIB)
        if not self._has_room(num_bytes):
            self.num_retries += 1
            self.empty_cache()
            if self.is_expandable:  # other blocks than before may grow
                num_bytes = self._ranges[id(pool)].missing_bytes(wanted)
        if not self._has_room(num_bytes):
            raise OutOfMemoryError(
                f"no room for a segment of {num_bytes / MIB:,.1f} MiB (a request of "
                f"{wanted / MIB:,.1f} MiB): {self.allocated_bytes / MIB:,.1f} MiB are "
                f"allocated and {self.reserved_bytes / MIB:,.1f} MiB reserved of "
                f"{(self.capacity_bytes or 0) / MIB:,.1f} MiB"
            )
        if self.is_expandable:
            self._take(pool, num_bytes)
            return self._ranges[id(pool)].grow(pool, wanted)
        block = Block(num_bytes=num_bytes, address=self._next_address, pool=pool)
        # Segments are not neighbours, although their addresses are consecutive.
        self._next_address += num_bytes
        self._take(pool, num_bytes)
        return block

    def _has_room(self, num_bytes: int) -> bool:
        return (
            self.capacity_bytes is None
            or self.reserved_bytes + num_bytes <= self.capacity_bytes
        )
