"""Find the largest batch, sequence or depth that fits, from few probes.

The memory of a step grows nearly linearly with each of the three, so two probes suffice
to estimate the third. Both the answer and the answer + 1 are probed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

MOST_LINES = 8
STRIDE = 16
"""Factor between probes while the bytes do not grow."""
BytesOf = Callable[[int], float]
"""Function from a value to the number of bytes it needs; infinity if it cannot run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The largest value that fits, with all probes."""

    largest: int
    """0 if not even the smallest value fits."""
    probes: dict[int, float]
    """Number of bytes needed, by probed value."""


def largest_that_fits(probe: BytesOf, room_bytes: float, at_most: int) -> Fit:
    """Return the largest value from 1 to `at_most` that needs at most `room_bytes`.

    Args:
        probe: number of bytes that a value needs; never decreases as the value grows.
        room_bytes: number of available bytes.
        at_most: upper bound, set by the model or the user.

    Returns:
        The answer and all probes.
    """
    probes: dict[int, float] = {}

    def fits(value: int) -> bool:
        if value not in probes:
            probes[value] = probe(value)
        return probes[value] <= room_bytes

    if not fits(1):
        return Fit(largest=0, probes=probes)
    low, high = 1, at_most + 1  # largest that fits, smallest that does not
    while high - low > 1:
        guess = _next(probes, low, high, room_bytes)
        if fits(guess):
            low = guess
        else:
            high = guess
    return Fit(largest=low, probes=probes)


def _next(probes: dict[int, float], low: int, high: int, room_bytes: float) -> int:
    """Return where a line through the probes meets `room_bytes`, inside the bounds.

    A poor line would converge slowly: after `MOST_LINES` probes, bisection is used.
    """
    if len(probes) > MOST_LINES:
        return (low + high) // 2
    other = high if math.isfinite(probes.get(high, math.inf)) else None
    if other is None:
        other = max((value for value in probes if value < low), default=low)
    rise = (probes[other] - probes[low]) / ((other - low) or 1)
    if rise <= 0:  # a single point, or a plateau of the allocator's rounding
        return min(STRIDE * low, high - 1)
    line = low + int((room_bytes - probes[low]) / rise)
    # A line beyond a value that cannot run would approach it one by one.
    most = (low + high) // 2 if probes.get(high) == math.inf else high - 1
    return min(max(line, low + 1), max(most, low + 1))
