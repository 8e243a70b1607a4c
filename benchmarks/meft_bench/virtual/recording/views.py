"""A trace, summed up: what for, when, where and by what memory was held and moved.

`Trace.peak` tells what a peak consists of by kind; here are the same bytes, at the peak
or at any moment, by phase, module, block and operator, what each block saves for
backward, and what crossed the link. A device of None is the accelerator.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from meft_bench.shared.registry import nearest
from meft_bench.virtual.recording.trace import Copy, Peak, Storage, Trace

NAMES = ("kind", "phase", "block", "module", "operator")
"""What memory is summed up by: what it is for, or where and by what it was made."""
_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What is held after something was made or let go."""

    time: int
    """In operators."""
    phase: str
    """Of the last thing made."""
    by_name: dict[str, int]


def block_of(module: str) -> str:
    """The block that a module is in, or itself if it is in none.

    `bert.encoder.layer.3.attention.self` is in `bert.encoder.layer.3`.
    """
    found = _BLOCK.match(module)
    return found.group() if found else module


def timeline(
    trace: Trace, device: str | None = None, start: int = 0, of: str = "kind"
) -> Iterator[Moment]:
    """What was held on `device` from time `start` on, one moment per change.

    Args:
        trace: what was written down.
        device: whose memory.
        start: in operators.
        of: one of `NAMES`, by which each moment is summed up.
    """
    held = trace.held(device or trace.accelerator, _name(trace, of))
    for time, phase, _, by_name in held:
        if time >= start:
            sums = {name: size for name, size in by_name.items() if size}
            yield Moment(time=time, phase=phase, by_name=sums)


def peak_by_phase(
    trace: Trace, device: str | None = None, start: int = 0
) -> dict[str, int]:
    """The most that was held on `device` during each phase."""
    most: dict[str, int] = {}
    for time, phase, total, _ in trace.held(device or trace.accelerator):
        if time >= start:
            most[phase] = max(most.get(phase, 0), total)
    return most


def at_peak(trace: Trace, peak: Peak, of: str) -> dict[str, int]:
    """What was alive at a peak, summed up; largest first.

    Args:
        trace: that the peak is of.
        peak: from `Trace.peak`.
        of: one of `NAMES`.

    Workspaces are of no module, and not in it.
    """
    name = _name(trace, of)
    found: Counter[str] = Counter()
    for storage in peak.alive:
        found[name(storage)] += trace.rounded(storage.num_bytes)
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


def _name(trace: Trace, of: str) -> Callable[[Storage], str]:
    if of not in NAMES:
        raise ValueError(f"memory is not summed up by {of!r}; {nearest(of, NAMES)}")
    if of == "kind":
        return trace.kind_of
    if of == "block":
        return lambda storage: block_of(storage.module)
    return attrgetter(of)
