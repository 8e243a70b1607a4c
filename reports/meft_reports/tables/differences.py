"""Differences of scores between two methods, with confidence intervals.

A pair is two methods that trained with the same seeds on the same rows, equal in every
option that both use except the learning rate. A score has two sources of randomness, so
there are two intervals of 95 %:

    over seeds    Student's t over the differences of equal seeds
    over rows     normal, over the evaluated rows; a row counts with its mean over seeds
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import t as student

from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_count,
    format_difference,
    format_score,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.methods import is_stored
from meft_reports.summary import (
    OPTIONS,
    PROVENANCE,
    WORKLOAD,
    learned,
    prepare,
    settings,
    split,
    spread,
)
from meft_reports.tables.table import (
    METHOD,
    Heading,
    Table,
    join_options,
    notes_on,
    notes_on_scores,
)

TAIL = 0.975
"""Quantile of the upper end of an interval of 95 %."""
MAY_DIFFER = ("learning_rate", "reference", "warmup_steps")
COLUMNS = (
    METHOD,
    Heading("less", "Method whose score is subtracted, with its options."),
    Heading("seeds", "Number of seeds that both methods trained with."),
    Heading("score", "Score of the method, the mean over these seeds."),
    Heading("less its score", "Score of the method that is subtracted."),
    Heading("difference", "Mean difference of the scores of equal seeds."),
    Heading(
        "interval over seeds",
        "Interval of 95 % of the difference over seeds, by Student's t.",
    ),
    Heading(
        "interval over rows",
        "Interval of 95 % of the difference over evaluated rows, by the normal "
        "distribution.",
    ),
    Heading("rows", "Number of evaluated rows."),
)
NOTES = (
    "Intervals of 95 %: over seeds by Student's t, which few seeds make wide; over the "
    "evaluated rows by the normal distribution, where the score is a share of right "
    "rows. Where 0 lies in one of them, the run does not tell the two methods apart.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of two methods, over the seeds that both have."""

    scores: tuple[float, float]
    by_seed: tuple[float, ...]
    by_row: tuple[float, ...] | None
    """Differences per row, averaged over seeds; None if unknown.

    They are unknown if the score is not a share of rows, or its rows were not recorded.
    """


NEEDS = (
    "scores of two methods with two seeds in common, on the same workload of a task "
    "other than synthetic and synthetic-lm"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload in which two methods have two seeds in common."""
    rows = learned(prepare(frame))
    is_scored = (rows["status"] == "ok") & rows["score"].notna()
    rows = rows[is_scored & ~rows["method"].map(is_stored).astype(bool)]
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    tables = []
    for _, part in split(rows, [*WORKLOAD, *PROVENANCE]):
        pairs = itertools.combinations(settings(part), 2)
        found = [row for a, b in pairs if (row := _row(b, a, part)) is not None]
        if found:
            tables.append(
                Table(
                    title=f"Differences of scores · {describe(part, shown)}",
                    columns=COLUMNS,
                    rows=tuple(found),
                    num_text_columns=2,
                    notes=(*NOTES, *notes_on(part), *notes_on_scores(part)),
                )
            )
    return tables


def _row(
    one: pd.DataFrame, other: pd.DataFrame, part: pd.DataFrame
) -> tuple[str, ...] | None:
    if not _are_alike(one.iloc[0], other.iloc[0]):
        return None
    found = _difference(one.set_index("seed"), other.set_index("seed"))
    if found is None:
        return None
    names = [
        join_options(rows["method"].iloc[0], option_label(rows.iloc[0], part))
        for rows in (one, other)
    ]
    freedom = len(found.by_seed) - 1
    return (
        *names,
        format_count(len(found.by_seed)),
        *map(format_score, found.scores),
        format_difference(statistics.fmean(found.by_seed)),
        _interval(found.by_seed, float(student.ppf(TAIL, freedom))),
        *_over_rows(found.by_row),
    )


def _over_rows(by_row: Sequence[float] | None) -> tuple[str, str]:
    if by_row is None:
        return NOTHING, NOTHING
    quantile = statistics.NormalDist().inv_cdf(TAIL)
    return _interval(by_row, quantile), format_count(len(by_row))


def _are_alike(one: "pd.Series[Any]", other: "pd.Series[Any]") -> bool:
    """Return whether two methods differ and agree in the options that both use.

    An option that one of the two methods does not use is null.
    """
    return one["method"] != other["method"] and all(
        is_null(one[name]) or is_null(other[name]) or one[name] == other[name]
        for name in OPTIONS
        if name not in MAY_DIFFER
    )


def _difference(one: pd.DataFrame, other: pd.DataFrame) -> Difference | None:
    seeds = sorted(set(one.index) & set(other.index))
    if len(seeds) < 2:
        return None
    mine, its = one.loc[seeds], other.loc[seeds]
    return Difference(
        scores=(float(mine["score"].mean()), float(its["score"].mean())),
        by_seed=tuple((mine["score"] - its["score"]).astype(float)),
        by_row=_by_row(mine, its),
    )


def _by_row(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, ...] | None:
    cells = pd.concat([one, other])
    if any(not _is_share(cell) for _, cell in cells.iterrows()):
        return None
    if len({len(right) for right in cells["right_rows"]}) != 1:
        return None
    mine, its = (
        [statistics.fmean(row) for row in zip(*rows["right_rows"], strict=True)]
        for rows in (one, other)
    )
    return tuple(a - b for a, b in zip(mine, its, strict=True))


def _is_share(cell: "pd.Series[Any]") -> bool:
    right = cell["right_rows"]
    return isinstance(right, list) and math.isclose(
        sum(right) / len(right), cell["score"], abs_tol=1e-6
    )


def _interval(values: Sequence[float], quantile: float) -> str:
    half = quantile * (spread(values) or 0.0) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    low, high = mean - half, mean + half
    text = f"{format_difference(low)} to {format_difference(high)}"
    return ShownNumber(text, "", None, low=low, high=high)
