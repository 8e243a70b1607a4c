"""Serve the requests of a ledger while it records them, as a GPU would.

`replay` does the same with a finished trace, and is what tests compare this with.
"""

from collections.abc import Callable

import torch

from meft_bench.virtual.device.allocator import Block, OutOfMemoryError
from meft_bench.virtual.device.memory_stats import CountingAllocator
from meft_bench.virtual.recording.trace import StorageEvent, frees_in_order

Describe = Callable[[StorageEvent, dict[int | None, Block | None]], str]
"""Function from a request and the blocks in use to a text on both."""


class LiveMemory:
    """The memory of an accelerator, at the present moment of a recording.

    Args:
        capacity_bytes: number of bytes that the driver can provide.
        is_enforced: whether a request that there is no room for raises an error; if
            not, it is served, and so is every later one, without a limit.
    """

    def __init__(self, capacity_bytes: int, *, is_enforced: bool) -> None:
        self.error = ""
        """The message of the first request without room; "" where that is enforced."""
        self._is_enforced = is_enforced
        self._allocator = CountingAllocator(capacity_bytes)
        self._blocks: dict[int | None, Block | None] = {}
        self._frees: list[StorageEvent] = []
        """Consecutive frees, which a trace sorts."""

    @property
    def allocator(self) -> CountingAllocator:
        """The allocator, after all events so far."""
        for event in frees_in_order(self._frees):
            self._allocator.free(self._blocks.pop(event.storage, None))
        self._frees.clear()
        return self._allocator

    def serve(self, event: StorageEvent, describe: Describe) -> None:
        """Serve an allocation or a free.

        Args:
            event: an event on the accelerator.
            describe: describes a request that there is no room for.

        Raises:
            torch.OutOfMemoryError: there is no room, and the limit is enforced.
        """
        if not event.is_birth:
            if event.storage is None:
                self._allocator.free(self._blocks.pop(None, None))
            else:
                self._frees.append(event)
            return
        allocator = self.allocator
        try:
            block = allocator.malloc(event.num_bytes)
        except OutOfMemoryError as error:
            text = out_of_memory(error, describe(event, self._blocks))
            if self._is_enforced:
                raise torch.OutOfMemoryError(text) from None
            self.error = text
            allocator.capacity_bytes = None
            block = allocator.malloc(event.num_bytes)
        self._blocks[event.storage] = block


def out_of_memory(error: OutOfMemoryError, place: str) -> str:
    """Return the message of an error; it begins as that of torch on a GPU does.

    Args:
        error: what the model of the allocator says.
        place: a sentence on the request and on what is alive.
    """
    return f"CUDA out of memory. Predicted: {error}. {place}"
