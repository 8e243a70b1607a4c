"""Serve the requests of a ledger while it records them, as a GPU would.

`replay` does the same with a finished trace, and is what tests compare this with.
"""

from collections.abc import Callable

import torch

from meft_bench.virtual.device.allocator import OutOfMemoryError
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.device.memory_stats import CountingAllocator
from meft_bench.virtual.recording.trace import StorageEvent, frees_in_order

Describe = Callable[[StorageEvent, dict[int | None, Block | None]], str]
"""Function from a request and the blocks in use to a text on both."""


OUT_OF_MEMORY = ("raise", "raise at query", "go on")
"""What a request does that there is no room for.

raise            raises an error, as on the GPU
raise at query   is served, like all later ones, without a limit; the first query of the
                 memory raises the error
go on            is served without a limit, and the message is kept
"""


class LiveMemory:
    """The memory of an accelerator, at the present moment of a recording.

    Args:
        capacity_bytes: number of bytes that the driver can provide.
        out_of_memory: what happens when there is no room for a request, one of
            `OUT_OF_MEMORY`.
    """

    def __init__(self, capacity_bytes: int, out_of_memory: str) -> None:
        self.error = ""
        """The message of the first request without room; "" if errors are raised."""
        self.out_of_memory = out_of_memory
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
            torch.OutOfMemoryError: there is no room, and that is an error.
        """
        if not event.is_birth:
            if event.storage is None:
                self._allocator.free(self._blocks.pop(None, None))
            else:
                self._frees.append(event)
            return
        allocator = self.allocator
        try:
            block = allocator.malloc(event.num_bytes, event.cuda_stream)
        except OutOfMemoryError as error:
            text = message_of(error, describe(event, self._blocks))
            if self.out_of_memory == "raise":
                raise torch.OutOfMemoryError(text) from None
            self.error = text
            allocator.capacity_bytes = None
            block = allocator.malloc(event.num_bytes, event.cuda_stream)
        self._blocks[event.storage] = block


def message_of(error: OutOfMemoryError, place: str) -> str:
    """Return the message of an error; it begins as that of torch on a GPU does.

    Args:
        error: what the model of the allocator says.
        place: a sentence on the request and on what is alive.
    """
    return f"CUDA out of memory. Predicted: {error}. {place}"
