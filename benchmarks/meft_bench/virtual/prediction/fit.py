"""The largest batch, sequence or depth that fits, from few probes.

What a step takes grows with any of the three, nearly in proportion, so two probes tell
where a third should be. The answer is probed, and so is the answer + 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

MOST_LINES = 8
Probe = Callable[[int], float]
"""Bytes that are needed at a value; infinity where it cannot be run at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The answer and how it was found."""

    largest: int
    """0 where not even the least fits."""
    probes: dict[int, float]
    """Every value that was tried, and the bytes it needs."""


def largest_that_fits(probe: Probe, room_bytes: float, at_most: int) -> Fit:
    """The largest value from 1 to `at_most` that needs no more than `room_bytes`.

    Args:
        probe: what a value needs; never falls as the value grows.
        room_bytes: what there is.
        at_most: what the model or the person allows.
    """
    probes: dict[int, float] = {}

    def fits(value: int) -> bool:
        if value not in probes:
            probes[value] = probe(value)
        return probes[value] <= room_bytes

    if not fits(1):
        return Fit(largest=0, probes=probes)
    low, high = 1, at_most + 1  # the largest known to fit, the least known not to
    while high - low > 1:
        guess = _next(probes, low, high, room_bytes)
        if fits(guess):
            low = guess
        else:
            high = guess
    return Fit(largest=low, probes=probes)


def _next(probes: dict[int, float], low: int, high: int, room_bytes: float) -> int:
    """Where a straight line through what is known meets the room, inside the bounds.

    A line that is far off would creep: after some probes, halves are taken.
    """
    if len(probes) > MOST_LINES:
        return (low + high) // 2
    other = high if math.isfinite(probes.get(high, math.inf)) else None
    if other is None:
        other = max((value for value in probes if value < low), default=low)
    rise = (probes[other] - probes[low]) / ((other - low) or 1)
    if rise <= 0:  # one point alone, or a step of the allocator's
        return min(2 * low, high - 1)
    line = low + int((room_bytes - probes[low]) / rise)
    return min(max(line, low + 1), high - 1)
