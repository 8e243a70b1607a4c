"""Memory of CUDA streams: what one has freed, no other gets."""

from typing import Any

import pytest
import torch

import meft_bench
from meft_bench.virtual.device.allocator import MIB, CachingAllocator
from meft_bench.virtual.device.memory_stats import CountingAllocator
from meft_bench.virtual.recording.replay import replay

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)


@pytest.mark.parametrize("is_expandable", [False, True])
@pytest.mark.parametrize("num_bytes", [1000, 30 * MIB])
def test_a_stream_does_not_get_what_another_has_freed(
    num_bytes: int, is_expandable: bool
) -> None:
    """It gets what it has freed itself."""
    allocator = CachingAllocator(is_expandable=is_expandable)
    allocator.free(allocator.malloc(num_bytes, 0))
    reserved_bytes = allocator.reserved_bytes
    allocator.free(allocator.malloc(num_bytes, 1))
    assert allocator.reserved_bytes == 2 * reserved_bytes
    allocator.malloc(num_bytes, 0)
    allocator.malloc(num_bytes, 1)
    assert allocator.reserved_bytes == 2 * reserved_bytes


def test_free_memory_of_every_stream_is_returned_to_the_driver() -> None:
    """Before a request fails: the second one has room after that."""
    allocator = CachingAllocator(40 * MIB)
    allocator.free(allocator.malloc(30 * MIB, 1))
    allocator.malloc(30 * MIB, 0)
    assert allocator.num_retries == 1
    assert allocator.reserved_bytes == 30 * MIB


def test_a_snapshot_names_the_stream_of_a_segment() -> None:
    allocator = CountingAllocator()
    for cuda_stream in (0, 3):
        allocator.malloc(30 * MIB, cuda_stream)
    assert [one["stream"] for one in allocator.segments()] == [0, 3]
    assert allocator.statistics()["segment"]["large_pool"]["current"] == 2


def freed(num_bytes: int = 30 * MIB) -> None:
    torch.empty(num_bytes, dtype=torch.uint8, device="cuda")


def test_tensors_have_memory_of_the_current_stream() -> None:
    """In the trace as well, whose replay reserves the same."""
    with meft_bench.virtual_gpu("T4") as gpu:
        freed()
        freed()
        assert torch.cuda.memory_reserved() == 30 * MIB
        with torch.cuda.stream(torch.cuda.Stream()):
            freed()
        assert torch.cuda.memory_reserved() == 60 * MIB
        freed()
        assert torch.cuda.memory_reserved() == 60 * MIB
        trace = gpu.ledger.trace()
    assert replay(trace).reserved_bytes == 60 * MIB


def test_a_stream_is_current_until_its_context_ends() -> None:
    """By a context of either kind, and by `set_stream`."""
    with meft_bench.virtual_gpu("T4"):
        default: Any = torch.cuda.current_stream()
        assert default == torch.cuda.default_stream()
        one, other = torch.cuda.Stream(), torch.cuda.Stream()
        assert one != other
        with torch.cuda.stream(one):
            with other:
                assert torch.cuda.current_stream() == other
            assert torch.accelerator.current_stream() == one
            with torch.cuda.stream(None):
                assert torch.cuda.current_stream() == one
        assert torch.cuda.current_stream() == default
        torch.cuda.set_stream(other)
        assert torch.cuda.current_stream() == other
    with meft_bench.virtual_gpu("T4"):
        assert torch.cuda.current_stream() == default


def test_32_streams_of_a_priority_are_handed_out_in_turn() -> None:
    """As torch does: more streams than that share their memory."""
    with meft_bench.virtual_gpu("T4"):
        streams = [torch.cuda.Stream() for _ in range(33)]
        urgent = torch.cuda.Stream(priority=-1)
    assert len(set(streams)) == 32
    assert streams[32] == streams[0]
    assert urgent not in streams
