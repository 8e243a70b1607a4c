"""The recording of a ledger: the lifetime of every storage, and all copies.

Time is counted in operators. A storage's `kind` is decided in this module and not while
it is alive, because it depends on when the storage is freed.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

KINDS = (
    "parameters",
    "frozen",
    "buffers",
    "gradients",
    "optimizer",
    "unsharded",
    "communication",
    "inputs",
    "saved",
    "forward",
    "backward",
    "recompute",
    "update",
    "workspace",
    "libraries",
    "unattributed",
)
"""Kinds of memory, in the order in which they are shown.

parameters, frozen   weights that are trained, and weights that are not
buffers, inputs      buffers of modules; everything allocated before the step
gradients, optimizer gradients of parameters; optimizer state
unsharded            whole parameters of FSDP2, while they are in use
communication        buffers of collectives, such as those that gather parameters
saved                allocated in forward and still alive when backward begins
forward ... update   allocated in that phase and freed soon; `recompute` is a forward
                     that runs inside backward
workspace            memory that kernels allocate internally
libraries            memory that libraries for matrix products never free
unattributed         on a real GPU, what was allocated before the step and belongs to no
                     tensor that was recorded: workspaces of libraries, for one
"""

BACKWARD = ("backward", "recompute")
"""Phases that alternate within one backward."""


@dataclass(slots=True, eq=False)
class Storage:
    """One storage."""

    index: int
    num_bytes: int
    """Requested size; an allocator rounds it up."""
    device: str
    operator: str
    module: str
    """Module that allocated it, or whose parameter it belongs to; "" if there is none.
    """
    phase: str
    step: int
    shape: tuple[int, ...]
    dtype: str
    born: int
    died: int | None = None
    kind: str = ""
    """Set where known; otherwise derived from phase and lifetime (`Trace.kind_of`)."""


class StorageEvent(NamedTuple):
    """An allocation or a free of a storage, or of a kernel's workspace."""

    time: int
    storage: int | None
    num_bytes: int
    """Size; a workspace is allocated and freed within one operator."""
    is_birth: bool
    cuda_stream: int = 0
    """Number of the stream that was current at an allocation; 0 is the default one."""


@dataclass(frozen=True, slots=True)
class RecordedCopy:
    """Bytes copied between host and device by one operator."""

    time: int
    direction: str
    """`h2d` or `d2h`."""
    num_bytes: int
    phase: str
    module: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The time at which most bytes were held."""

    num_bytes: int
    time: int
    by_kind: dict[str, int]
    alive: tuple[Storage, ...]
    """Storages by size, largest first; without workspaces."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The whole recording, in order."""

    storages: tuple[Storage, ...]
    events: tuple[StorageEvent, ...]
    copies: tuple[RecordedCopy, ...]
    """Copies between host and accelerator; none are recorded where `has_link` is false.
    """
    round_bytes: int
    accelerator: str = "cuda"
    """Type of the device on which the tensors of the GPU are."""

    @property
    def has_link(self) -> bool:
        """Whether the accelerator's memory can be distinguished from the host's."""
        return self.accelerator != "cpu"

    @cached_property
    def _backwards(self) -> list[int]:
        """Times of the first allocation of each backward after a forward."""
        began, before = [], ""
        for storage in self.storages:
            if storage.phase in BACKWARD and before not in BACKWARD:
                began.append(storage.born)
            before = storage.phase
        return began

    def forward_of(self, storage: Storage) -> int:
        """Return the number of backwards that began before a storage was made."""
        return bisect_right(self._backwards, storage.born)

    def kind_of(self, storage: Storage) -> str:
        """Return the kind of a storage, one of `KINDS`."""
        if storage.kind:
            return storage.kind
        if storage.phase != "forward":
            return storage.phase
        place = self.forward_of(storage)
        if place == len(self._backwards):
            return "forward"  # no backward has begun since
        lives_on = storage.died is None or storage.died > self._backwards[place]
        return "saved" if lives_on else "forward"

    def rounded(self, num_bytes: int) -> int:
        """Return the size of an allocator's block for `num_bytes`."""
        return -(-num_bytes // self.round_bytes) * self.round_bytes

    def held(
        self, device: str, name: Callable[[Storage], str] | None = None
    ) -> Iterator[tuple[int, str, int, Counter[str]]]:
        """Yield (time, phase, bytes held, bytes by name) after every event on `device`.

        The phase is that of the last allocation on any device. The counter is one
        object that is updated in place; a kernel's workspace always has the name
        `workspace`.

        Args:
            device: the device whose memory is counted.
            name: function from a storage to the name under which it is summed; None for
                its kind.
        """
        name = name or self.kind_of
        by_name: Counter[str] = Counter()
        total = 0
        phase = "forward"
        for event in self.events:
            if event.storage is None:
                summed, size = "workspace", self.rounded(event.num_bytes)
            else:
                storage = self.storages[event.storage]
                if event.is_birth:
                    phase = storage.phase
                if storage.device != device:
                    continue
                summed, size = name(storage), self.rounded(storage.num_bytes)
            size = size if event.is_birth else -size
            total += size
            by_name[summed] += size
            yield event.time, phase, total, by_name

    def peak(self, device: str | None = None, start: int = 0) -> Peak:
        """Return the first time from `start` on at which most bytes were held.

        Args:
            device: the device whose memory is counted; None for the accelerator.
            start: time in operators; earlier events are not considered.
        """
        device = device or self.accelerator
        most, when, by_kind = -1, start, Counter[str]()
        for time, _, total, kinds in self.held(device):
            if time >= start and total > most:
                most, when, by_kind = total, time, Counter(kinds)
        alive = [
            s
            for s in self.storages
            if s.device == device
            and s.born <= when
            and (s.died is None or s.died >= when)
        ]
        return Peak(
            num_bytes=max(most, 0),
            time=when,
            by_kind={k: by_kind[k] for k in KINDS if by_kind[k]},
            alive=tuple(sorted(alive, key=lambda s: -s.num_bytes)),
        )


def in_order(events: list[StorageEvent]) -> Iterator[StorageEvent]:
    """Yield events with consecutive frees sorted by storage."""
    row: list[StorageEvent] = []
    for event in events:
        if event.storage is not None and not event.is_birth:
            row.append(event)
            continue
        yield from frees_in_order(row)
        row.clear()
        yield event
    yield from frees_in_order(row)


def frees_in_order(frees: list[StorageEvent]) -> list[StorageEvent]:
    """Return consecutive frees sorted by storage.

    The cache of autocast is a hash map over addresses, which differ in every process,
    and frees its entries in its own order.
    """
    return sorted(frees, key=lambda e: (e.time, e.storage))
