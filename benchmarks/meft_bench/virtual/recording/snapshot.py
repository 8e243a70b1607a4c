"""Replay the history of a real allocator on the model of the allocator.

    torch.cuda.memory._record_memory_history(context=None)
    step()
    (history,) = torch.cuda.memory._snapshot()["device_traces"]
    serve(history).reserved_bytes        # compare with max_memory_reserved()

Any difference is an error of the model: sizes and order are the real ones.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from meft_bench.virtual.device.allocator import CachingAllocator
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.recording.replay import Replay, held_by


def serve(history: Iterable[Mapping[str, Any]], start_bytes: int = 0) -> Replay:
    """Replay all requests of a history in order.

    Frees of memory that was allocated before the history are ignored.

    Args:
        history: entries with `action`, `addr` and `size`, as PyTorch records them.
        start_bytes: bytes allocated before the history began, treated as one block.

    Returns:
        Peaks and final values, in bytes.
    """
    allocator = CachingAllocator()
    allocator.malloc(start_bytes)
    blocks: dict[int, Block | None] = {}
    for entry in history:
        if entry["action"] == "alloc":
            blocks[entry["addr"]] = allocator.malloc(entry["size"])
        elif entry["action"] == "free_completed":
            allocator.free(blocks.pop(entry["addr"], None))
    return held_by(allocator)
