"""A real allocator's own history, served once more by the model of it.

    torch.cuda.memory._record_memory_history(context=None)
    step()
    (history,) = torch.cuda.memory._snapshot()["device_traces"]
    serve(history).reserved_bytes        # beside torch.cuda.max_memory_reserved()

What differs is the model's fault alone: sizes and order are the real ones.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from meft_bench.virtual.device.allocator import Block, CachingAllocator
from meft_bench.virtual.recording.replay import Replay, held_by


def serve(history: Iterable[Mapping[str, Any]], start_bytes: int = 0) -> Replay:
    """Serve all requests of a history in its order.

    Args:
        history: entries with `action`, `addr` and `size`, as PyTorch records them.
        start_bytes: allocated before the history began, in one block.

    What was there before the history and is freed in it is passed over.
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
