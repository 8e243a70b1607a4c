"""What a ledger wrote down: every storage from birth to death, and what moved.

Time is counted in operators. A storage's `kind` is decided here and not while it lives,
because only its death tells what it was for.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

KINDS = (
    "parameters",
    "frozen",
    "buffers",
    "gradients",
    "optimizer",
    "inputs",
    "saved",
    "forward",
    "backward",
    "recompute",
    "update",
    "workspace",
    "libraries",
)
"""What memory is for, in the order in which it is shown.

parameters, frozen   weights that train, and that do not
buffers, inputs      of modules; whatever was made before the step
gradients, optimizer of parameters; state of theirs
saved                made in forward and still there when backward begins
forward ... update   made in that phase and gone soon; `recompute` is a forward that
                     runs inside backward
workspace            that kernels take for themselves
libraries            that those which multiply matrices keep for ever
"""

BACKWARD = ("backward", "recompute")
"""Phases that are mixed in one backward."""


@dataclass(slots=True, eq=False)
class Storage:
    """One piece of memory."""

    index: int
    num_bytes: int
    """As asked for; an allocator rounds it up."""
    device: str
    operator: str
    module: str
    """Where it was made, or whose parameter it belongs to; "" outside of all."""
    phase: str
    step: int
    shape: tuple[int, ...]
    dtype: str
    born: int
    died: int | None = None
    kind: str = ""
    """Told by whoever knows; else it follows from phase and life (`Trace.kind_of`)."""


@dataclass(frozen=True, slots=True)
class Event:
    """A storage is born or dies, or a kernel takes a workspace and gives it back."""

    time: int
    storage: int | None
    num_bytes: int
    """Of a workspace, which is born and dies in one."""
    is_birth: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes between host and device, by one operator."""

    time: int
    direction: str
    """`h2d` or `d2h`."""
    num_bytes: int
    phase: str
    module: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most was held."""

    num_bytes: int
    time: int
    by_kind: dict[str, int]
    alive: tuple[Storage, ...]
    """Largest first; without workspaces."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """All of it, in order."""

    storages: tuple[Storage, ...]
    events: tuple[Event, ...]
    copies: tuple[Copy, ...]
    """Between host and accelerator; none are seen where `has_link` is false."""
    round_bytes: int
    accelerator: str = "cuda"
    """Type of the device on which what is the GPU's lives."""

    @property
    def has_link(self) -> bool:
        """Whether the accelerator's memory can be told from the host's."""
        return self.accelerator != "cpu"

    @cached_property
    def _backwards(self) -> list[int]:
        """When each of them began: the first thing that one made, after a forward."""
        began, before = [], ""
        for storage in self.storages:
            if storage.phase in BACKWARD and before not in BACKWARD:
                began.append(storage.born)
            before = storage.phase
        return began

    def kind_of(self, storage: Storage) -> str:
        """What the storage was for, one of `KINDS`."""
        if storage.kind:
            return storage.kind
        if storage.phase != "forward":
            return storage.phase
        place = bisect_right(self._backwards, storage.born)
        began = self._backwards[place] if place < len(self._backwards) else math.inf
        lives_on = storage.died is None or storage.died > began
        return "saved" if lives_on else "forward"

    def rounded(self, num_bytes: int) -> int:
        """As an allocator's block."""
        return -(-num_bytes // self.round_bytes) * self.round_bytes

    def held(
        self, device: str, name: Callable[[Storage], str] | None = None
    ) -> Iterator[tuple[int, str, int, Counter[str]]]:
        """(time, phase, bytes held, bytes by name) after every event on `device`.

        Args:
            device: whose memory.
            name: what a storage is summed up under; None for its kind.

        The phase is that of what was made last, in any place. The counter is one object
        that goes on changing; a kernel's workspace has no other name.
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
        """The first moment from time `start` on at which most was held.

        Args:
            device: whose memory; None for the accelerator's.
            start: what was before does not count.
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
