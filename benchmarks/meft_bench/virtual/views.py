"""A trace, summed up: what for, when, where and by what memory was held and moved.

`Trace.peak` tells what a peak consists of; here are the same bytes by phase, module,
block and operator, what each block saves for backward, and what crossed the link.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from meft_bench.virtual.trace import Copy, Peak, Storage, Trace

_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What is held after something was made or let go."""

    time: int
    """In operators."""
    phase: str
    """Of the last thing made."""
    by_kind: dict[str, int]


def block_of(module: str) -> str:
    """The block that a module is in, or itself if it is in none.

    `bert.encoder.layer.3.attention.self` is in `bert.encoder.layer.3`.
    """
    found = _BLOCK.match(module)
    return found.group() if found else module


def timeline(
    trace: Trace, device: str | None = None, start: int = 0
) -> Iterator[Moment]:
    """What was held on `device` from time `start` on, one moment per change.

    Here and below, a device of None is the accelerator.
    """
    device = device or trace.accelerator
    phases = _phases(trace, device)
    for time, _, by_kind in trace.held(device):
        phase = next(phases)
        if time >= start:
            kinds = {kind: size for kind, size in by_kind.items() if size}
            yield Moment(time=time, phase=phase, by_kind=kinds)


def peak_by_phase(
    trace: Trace, device: str | None = None, start: int = 0
) -> dict[str, int]:
    """The most that was held on `device` during each phase."""
    device = device or trace.accelerator
    most: dict[str, int] = {}
    for phase, (time, total, _) in zip(
        _phases(trace, device), trace.held(device), strict=True
    ):
        if time >= start:
            most[phase] = max(most.get(phase, 0), total)
    return most


def at_peak(trace: Trace, peak: Peak, of: str) -> dict[str, int]:
    """What was alive at a peak, summed up; largest first.

    Args:
        trace: that the peak is of.
        peak: from `Trace.peak`.
        of: `kind`, `phase`, `block`, `module` or `operator`, by which it was made.

    Workspaces are of no module, and not in it.
    """
    found: Counter[str] = Counter()
    for storage in peak.alive:
        found[_name(trace, storage, of)] += trace.rounded(storage.num_bytes)
    return dict(found.most_common())


def saved_by_block(
    trace: Trace, step: int, device: str | None = None
) -> dict[str, int]:
    """Bytes that the forward of a step left for its backward, by block."""
    device = device or trace.accelerator
    found: dict[str, int] = defaultdict(int)
    for storage in trace.storages:
        is_of_step = storage.step == step and storage.device == device
        if is_of_step and trace.kind_of(storage) == "saved":
            found[block_of(storage.module)] += storage.num_bytes
    return dict(found)


def moved(trace: Trace, start: int = 0) -> dict[tuple[str, str, str], int]:
    """Bytes between host and device after `start`, by direction, phase and block."""
    found: Counter[tuple[str, str, str]] = Counter()
    for copy in copies_after(trace, start):
        found[copy.direction, copy.phase, block_of(copy.module)] += copy.num_bytes
    return dict(sorted(found.items()))


def copies_after(trace: Trace, start: int) -> Iterator[Copy]:
    """Copies between host and device that began after `start`."""
    return (copy for copy in trace.copies if copy.time > start)


def _phases(trace: Trace, device: str) -> Iterator[str]:
    """Of every event on `device`, the phase of what was made last, in any place."""
    phase = "forward"
    for event in trace.events:
        if event.storage is None:
            yield phase
            continue
        storage = trace.storages[event.storage]
        if event.is_birth:
            phase = storage.phase
        if storage.device == device:
            yield phase


def _name(trace: Trace, storage: Storage, of: str) -> str:
    if of == "kind":
        return trace.kind_of(storage)
    if of == "block":
        return block_of(storage.module)
    return str(getattr(storage, of))
