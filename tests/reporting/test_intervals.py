"""Intervals over seeds, rows, and both."""

import numpy as np
import pytest
from scipy import stats

from meft_reports.intervals import (
    Interval,
    over_rows,
    over_seeds,
    over_seeds_and_rows,
    row_values,
    same_rows,
)


def draw(
    rng: np.random.Generator, seeds: float, rows: float, rest: float
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Three seeds by 60 rows with these standard deviations, and a mean of 0."""
    return (
        rng.normal(0, seeds, (3, 1))
        + rng.normal(0, rows, (1, 60))
        + rng.normal(0, rest, (3, 60))
    )


def holds(interval: Interval) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= 0 <= interval.high


@pytest.mark.parametrize(
    ("seeds", "rows", "rest"),
    [(0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.3, 0.0, 1.0), (0.5, 0.5, 0.0), (0, 0, 1.0)],
)
def test_an_interval_over_both_holds_the_mean_as_often_as_it_says(
    seeds: float, rows: float, rest: float
) -> None:
    """2,000 draws, whose share has a standard error of 0.005.

    It is lowest where seeds differ most, because three of them say little of how much.
    """
    rng = np.random.default_rng(0)
    found = [over_seeds_and_rows(draw(rng, seeds, rows, rest)) for _ in range(2000)]
    held = np.mean([holds(one) for one in found])
    assert 0.91 < held < 0.98
    rejected = np.mean([one.p < 0.05 for one in found])
    assert rejected == pytest.approx(1 - held)


def test_intervals_over_one_source_alone_are_too_narrow_where_both_vary() -> None:
    """The reason for an interval over both."""
    rng = np.random.default_rng(0)
    tables = [draw(rng, 0.2, 1.0, 0.0) for _ in range(1000)]
    rows = np.mean([holds(over_rows(t.mean(axis=0))) for t in tables])
    both = np.mean([holds(over_seeds_and_rows(t)) for t in tables])
    assert rows < 0.9 < 0.93 < both


def test_mean_squares_by_hand() -> None:
    """Two seeds by three rows, where both components are positive.

    Means of seeds are 2 and 4, of rows 1, 3 and 5; nothing is left but ±0.5.
    """
    values = [[0.5, 1.5, 4.0], [1.5, 4.5, 6.0]]
    found = over_seeds_and_rows(values)
    by_seed, by_row = 3 * 2.0, 2 * 4.0
    left = sum(x * x for x in (0.5, -0.5, 0.0) * 2) / 2
    total = by_seed + by_row - left
    freedom = total**2 / (by_seed**2 / 1 + by_row**2 / 2 + left**2 / 2)
    half = stats.t.ppf(0.975, freedom) * (total / 6) ** 0.5
    assert found.mean == 3.0
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(3 / (total / 6) ** 0.5, freedom))


def test_equal_seeds_leave_the_rows() -> None:
    rows = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = over_seeds_and_rows([rows] * 3)
    wanted = stats.ttest_1samp(rows, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(wanted))


def test_equal_rows_leave_the_seeds() -> None:
    found = over_seeds_and_rows([[0.1] * 4, [0.2] * 4, [0.4] * 4])
    assert found == pytest.approx(over_seeds([0.1, 0.2, 0.4]))


def test_nothing_varies() -> None:
    assert over_seeds_and_rows([[0.0, 0.0]] * 2) == (0.0, 0.0, 0.0, 1.0)
    for found in (over_seeds_and_rows([[1.0, 1.0]] * 2), over_seeds([0.1, 0.1])):
        assert found[1:] == (None, None, 1.0)  # two may agree by chance
    assert over_rows([1.0, 1.0, 1.0])[1:] == (None, None, 1.0)


def test_values_of_rows_have_the_score_as_their_mean() -> None:
    assert row_values(0.5, [1, 0], None) == [1, 0]
    assert row_values(0.4, [1, 0], None) is None
    assert row_values(0.5, None, None) is None
    assert row_values(0.5, [1, 1], [0.4, 0.8]) == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("values", [[[1, 0], None], [[1, 0], [1]], [[1], [0]], []])
def test_rows_that_are_not_the_same_are_not_compared(
    values: list[list[float] | None],
) -> None:
    assert same_rows(values) is None
    assert same_rows([[1, 0], [0, 1]]) == [[1, 0], [0, 1]]
