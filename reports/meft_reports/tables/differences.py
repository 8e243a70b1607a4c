"""Differences of scores between two methods, with confidence intervals.

A pair is two methods that trained with the same seeds on the same rows, equal in every
option that both use except the learning rate. A score has two sources of randomness, so
there are three intervals of 95 %, as `meft_reports.intervals` computes them:

    over both     over seeds and evaluated rows together
    over seeds    Student's t over the differences of equal seeds
    over rows     normal, over the evaluated rows; a row counts with its mean over seeds
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from meft_reports.columns.environment import FOR_SCORES
from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_count,
    format_difference,
    format_score,
    is_null,
)
from meft_reports.intervals import (
    Interval,
    over_rows,
    over_seeds,
    over_seeds_and_rows,
    row_values,
    same_rows,
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
)
from meft_reports.tables.table import (
    METHOD,
    Heading,
    Table,
    join_options,
    notes_on,
    notes_on_scores,
)

MAY_DIFFER = ("learning_rate", "reference", "warmup_steps")
COLUMNS = (
    METHOD,
    Heading("less", "Method whose score is subtracted, with its options."),
    Heading("seeds", "Number of seeds that both methods trained with."),
    Heading("score", "Score of the method, the mean over these seeds."),
    Heading("less its score", "Score of the method that is subtracted."),
    Heading("difference", "Mean difference of the scores of equal seeds."),
    Heading(
        "interval over both",
        "Interval of 95 % of the difference over seeds and evaluated rows together.",
    ),
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
    "Intervals of 95 %: over seeds and evaluated rows together, and over each of them "
    "alone; over seeds by Student's t, which few seeds make wide. Rows are known where "
    "the score is a share of right rows or a correlation. Where 0 lies in the interval "
    "over both, the run does not tell the two methods apart.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of two methods, over the seeds that both have."""

    num_seeds: int
    scores: tuple[float, float]
    over_both: Interval | None
    """None where it is not known what each row contributes to the score."""
    over_seeds: Interval
    over_rows: Interval | None
    num_rows: int

    @property
    def widest(self) -> Interval:
        """The interval over both where it is known, otherwise that over seeds."""
        return self.over_both or self.over_seeds


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
    if not are_alike(one.iloc[0], other.iloc[0]):
        return None
    found = difference(one.set_index("seed"), other.set_index("seed"))
    if found is None:
        return None
    names = [
        join_options(rows["method"].iloc[0], option_label(rows.iloc[0], part))
        for rows in (one, other)
    ]
    return (
        *names,
        format_count(found.num_seeds),
        *map(format_score, found.scores),
        format_difference(found.over_seeds.mean),
        show_interval(found.over_both),
        show_interval(found.over_seeds),
        show_interval(found.over_rows),
        format_count(found.num_rows) if found.num_rows else NOTHING,
    )


def are_alike(one: "pd.Series[Any]", other: "pd.Series[Any]") -> bool:
    """Return whether two methods differ, and agree in all that both say of a score.

    These are the options that both use, the weights, and the rows that are scored. An
    option that one of the two methods does not use is null.
    """
    names = [name for name in OPTIONS if name not in MAY_DIFFER]
    return one["method"] != other["method"] and all(
        is_null(one[name]) or is_null(other[name]) or one[name] == other[name]
        for name in (*names, *FOR_SCORES, "num_eval_rows")
    )


def difference(one: pd.DataFrame, other: pd.DataFrame) -> Difference | None:
    """Return the difference of two settings; None without two seeds in common.

    Args:
        one: rows of a setting, with `seed` as index.
        other: those of the one that is subtracted.
    """
    seeds = sorted(set(one.index) & set(other.index))
    if len(seeds) < 2:
        return None
    mine, its = one.loc[seeds], other.loc[seeds]
    less = (mine["score"] - its["score"]).astype(float).tolist()
    rows = same_rows([*_row_values(mine), *_row_values(its)])
    both, by_row, num_rows = None, None, 0
    if rows is not None:
        values = np.asarray(rows, float)
        table = values[: len(seeds)] - values[len(seeds) :]
        both, by_row = over_seeds_and_rows(table), over_rows(table.mean(axis=0))
        num_rows = table.shape[1]
    return Difference(
        num_seeds=len(seeds),
        scores=(float(mine["score"].mean()), float(its["score"].mean())),
        over_both=both,
        over_seeds=over_seeds(less),
        over_rows=by_row,
        num_rows=num_rows,
    )


def _row_values(rows: pd.DataFrame) -> list[Sequence[float] | None]:
    names = ("score", "right_rows", "row_scores")
    cells = zip(*(rows[name] for name in names), strict=True)
    return [row_values(*cell) for cell in cells]


def show_interval(interval: Interval | None) -> str:
    """Return an interval as text, with its ends as numbers; `NOTHING` for None."""
    if interval is None or interval.low is None or interval.high is None:
        return NOTHING
    low, high = interval.low, interval.high
    text = f"{format_difference(low)} to {format_difference(high)}"
    return ShownNumber(text, "", None, low=low, high=high)
