"""CUDA streams on which all work is complete, of which one is current.

Where time does not pass, a stream decides one thing: from which pools of the allocator
a tensor gets its memory. Those that are made while a stream is current have memory of
that stream, which no other stream gets when it is free (`allocator`).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch

STREAMS_OF_A_PRIORITY = 32
"""Number of streams that torch hands out in turn (c10/cuda/CUDAStream.cpp)."""
PRIORITIES = 4


class StreamStub:
    """A stream on which all work is complete.

    Args:
        device: the GPU, which is the only one.
        priority: 0, or below it for a stream that goes first.
    """

    device_index = 0
    device_type = 1

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda:0")
        self.priority = priority
        level = min(max(-priority, 0), PRIORITIES - 1)
        number = _made[level] % STREAMS_OF_A_PRIORITY
        _made[level] += 1
        self.stream_id = 1 + level * STREAMS_OF_A_PRIORITY + number
        self._before: list[StreamStub] = []

    @property
    def cuda_stream(self) -> int:
        """Its number; 0 is the default stream."""
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StreamStub) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def wait_stream(self, stream: Any) -> None:
        """Do nothing; all work is complete."""

    def wait_event(self, event: Any) -> None:
        """Do nothing; all work is complete."""

    def synchronize(self) -> None:
        """Do nothing; all work is complete."""

    def record_event(self, event: Any = None) -> Any:
        """Return an event that is complete."""
        return event or EventStub()

    def query(self) -> bool:
        """Return True; all work is complete."""
        return True

    def is_capturing(self) -> bool:
        """Return False; graphs are not modelled."""
        return False

    def __enter__(self) -> Self:
        self._before.append(current())
        make_current(self)
        return self

    def __exit__(self, *error: Any) -> None:
        make_current(self._before.pop())


class EventStub:
    """An event that is complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        """Do nothing; the event is complete."""

    def wait(self, *args: Any) -> None:
        """Do nothing; the event is complete."""

    def synchronize(self) -> None:
        """Do nothing; the event is complete."""

    def query(self) -> bool:
        """Return True; the event is complete."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Return 0.0; no time passes between events."""
        return 0.0


def default() -> StreamStub:
    """Return the stream that is current where code chooses none."""
    stream = StreamStub.__new__(StreamStub)
    stream.device, stream.priority, stream.stream_id = torch.device("cuda:0"), 0, 0
    stream._before = []
    return stream


# One virtual GPU is active at a time.
_made: Counter[int] = Counter()
"""Number of streams that were made, by priority."""
_current: list[StreamStub] = [default()]


def current() -> StreamStub:
    """Return the stream that is current."""
    return _current[0]


def make_current(stream: StreamStub | None) -> None:
    """Make a stream current; None has no effect."""
    if stream is not None:
        _current[0] = stream


@contextlib.contextmanager
def chosen(stream: StreamStub | None) -> Iterator[None]:
    """Make a stream current in the context; None has no effect."""
    before = current()
    make_current(stream)
    try:
        yield
    finally:
        make_current(before)


@contextlib.contextmanager
def of_a_new_gpu() -> Iterator[None]:
    """Begin with the default stream, before any other was made, and end with it."""
    _made.clear()
    make_current(default())
    try:
        yield
    finally:
        make_current(default())
