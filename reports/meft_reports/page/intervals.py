"""Intervals of 95 % of means.

over seeds    mean ± t · s / √n, Student's t with n - 1 degrees of freedom
over rows     mean ± z · s / √n, the normal distribution
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy.special import stdtr, stdtrit

TAIL = 0.975
"""Quantile of the upper end of an interval of 95 %."""
NORMAL = statistics.NormalDist()


class Interval(NamedTuple):
    """A mean and its interval; the ends are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    p: float
    """Two-sided p-value of the mean being 0; 1 for a single value."""


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the interval of the mean of values of different seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, 1.0)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = _quantile(len(values) - 1) * error
    p = _p(mean, error, lambda ratio: float(2 * stdtr(len(values) - 1, -ratio)))
    return Interval(mean, mean - half, mean + half, p)


def over_rows(values: Sequence[float]) -> Interval:
    """Return the interval of the mean of values of different rows."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, 1.0)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = NORMAL.inv_cdf(TAIL) * error
    p = _p(mean, error, lambda ratio: 2 * (1 - NORMAL.cdf(ratio)))
    return Interval(mean, mean - half, mean + half, p)


@functools.cache
def _quantile(freedom: int) -> float:
    return float(stdtrit(freedom, TAIL))


def _p(mean: float, error: float, tail: Callable[[float], float]) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return tail(abs(mean) / error)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [1.0] * len(values)
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected
