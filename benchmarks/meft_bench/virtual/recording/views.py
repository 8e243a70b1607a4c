"""Summaries of a trace: memory held and copied, by kind, phase, module and operator.

`Trace.peak` returns the bytes of a peak by kind. The functions of this module return
the same bytes, at the peak or at any time, by phase, module, block and operator, as
well as the bytes that each block saves for backward and those copied between host and
device. A device of None is the accelerator.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from meft_bench.shared.registry import nearest
from meft_bench.virtual.recording.trace import Peak, RecordedCopy, Storage, Trace

NAMES = ("kind", "phase", "block", "module", "operator")
"""Ways to sum memory: by what it is used for, or by where it was allocated."""
_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The bytes that are held after an allocation or a free."""

    time: int
    """Time in operators."""
    phase: str
    """Phase of the last allocation."""
    by_name: dict[str, int]


def block_of(module: str) -> str:
    """Return the block that contains a module, or the module itself if there is none.

    `bert.encoder.layer.3.attention.self` is in `bert.encoder.layer.3`.
    """
    found = _BLOCK.match(module)
    return found.group() if found else module


def timeline(
    trace: Trace, device: str | None = None, start: int = 0, of: str = "kind"
) -> Iterator[Moment]:
    """Yield the bytes held on `device` from time `start` on, once per change.

    Args:
        trace: the recording.
        device: the device whose memory is counted.
        start: time in operators.
        of: one of `NAMES`, by which the bytes are summed.
    """
    held = trace.held(device or trace.accelerator, _name(trace, of))
    for time, phase, _, by_name in held:
        if time >= start:
            sums = {name: size for name, size in by_name.items() if size}
            yield Moment(time=time, phase=phase, by_name=sums)


def peak_by_phase(
    trace: Trace, device: str | None = None, start: int = 0
) -> dict[str, int]:
    """Return the peak of the bytes held on `device` in each phase.

    Args:
        trace: the recording.
        device: the device whose memory is counted.
        start: time in operators.

    Returns:
        Bytes by phase.
    """
    most: dict[str, int] = {}
    for time, phase, total, _ in trace.held(device or trace.accelerator):
        if time >= start:
            most[phase] = max(most.get(phase, 0), total)
    return most


def at_peak(trace: Trace, peak: Peak, of: str) -> dict[str, int]:
    """Return the bytes that were alive at a peak, summed, largest first.

    Workspaces belong to no module and are not included.

    Args:
        trace: the recording of the peak.
        peak: a result of `Trace.peak`.
        of: one of `NAMES`.

    Returns:
        Bytes by name.
    """
    name = _name(trace, of)
    found: Counter[str] = Counter()
    for storage in peak.alive:
        found[name(storage)] += trace.rounded(storage.num_bytes)
    return dict(found.most_common())


def saved_by_block(
    trace: Trace, step: int, device: str | None = None
) -> dict[str, int]:
    """Return the bytes that a forward of a step saved for its backward, by block.

    Of several micro-batches, it is the one that saved most.

    Args:
        trace: the recording.
        step: index of the step.
        device: the device whose memory is counted.

    Returns:
        Bytes by block.
    """
    device = device or trace.accelerator
    saved = [
        storage
        for storage in trace.storages
        if storage.step == step
        and storage.device == device
        and trace.kind_of(storage) == "saved"
    ]
    by_forward: dict[int, Counter[str]] = defaultdict(Counter)
    for storage in saved:
        by_forward[trace.forward_of(storage)][block_of(storage.module)] += (
            storage.num_bytes
        )
    sums = {index: by_block.total() for index, by_block in by_forward.items()}
    return dict(by_forward[max(sums, key=lambda i: sums[i])]) if sums else {}


def moved(trace: Trace, start: int = 0) -> dict[tuple[str, str, str], int]:
    """Return the bytes copied between host and device after `start`.

    Args:
        trace: the recording.
        start: time in operators.

    Returns:
        Bytes by (direction, phase, block).
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for copy in copies_after(trace, start):
        found[copy.direction, copy.phase, block_of(copy.module)] += copy.num_bytes
    return dict(sorted(found.items()))


def copies_after(trace: Trace, start: int) -> Iterator[RecordedCopy]:
    """Yield the copies between host and device that began after `start`."""
    return (copy for copy in trace.copies if copy.time > start)


def _name(trace: Trace, of: str) -> Callable[[Storage], str]:
    if of not in NAMES:
        raise ValueError(f"memory is not summed up by {of!r}; {nearest(of, NAMES)}")
    if of == "kind":
        return trace.kind_of
    if of == "block":
        return lambda storage: block_of(storage.module)
    return attrgetter(of)
