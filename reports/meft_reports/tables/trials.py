"""Trials: the scores by which learning rates and the like were chosen.

A trial is scored on rows set aside from training, with a seed that no result has. One
row is one trial; results with its values are those that it was chosen for.
"""

from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_count, format_score
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    OPTIONS,
    PROVENANCE,
    WORKLOAD,
    by_method,
    is_trial,
    learned,
    prepare,
    split,
    varying,
)
from meft_reports.tables.table import METHOD, Heading, Table, join_options, notes_on

OF_TRIALS = ("scored_on",)
COLUMNS = (
    METHOD,
    Heading("score of the trial", "Score on rows set aside from training."),
    Heading("rows", "Number of these rows."),
    Heading(
        "chosen",
        "Whether the results of the run have the values of this trial, and whether a "
        "value is the smallest or the largest of those tried.",
    ),
)
NOTES = (
    "One trial for each value, or for each value and seed, with seeds of their own, "
    "scored on rows set aside from training. The best value of each method is that of "
    "its results, which are scored on other rows; of equal scores, the second and the "
    "third score decide, then the first value. Few rows make ties, and a best value "
    "at an end of those tried may not be the best of all.",
)
NEEDS = "cells scored on validation rows, as a matrix with `tune` makes them"
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload with trials."""
    rows = prepare(frame)
    results, trials = learned(rows), by_method(rows[is_trial(rows)])
    if trials.empty:
        return []
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    return [
        Table(
            title=f"Trials · {describe(part, shown)}",
            columns=COLUMNS,
            rows=tuple(_row(trial, part, results) for _, trial in part.iterrows()),
            notes=(*NOTES, *notes_on(part)),
        )
        for _, part in split(trials, [*WORKLOAD, *PROVENANCE])
    ]


def _row(
    trial: "pd.Series[Any]", part: pd.DataFrame, results: pd.DataFrame
) -> tuple[str, ...]:
    label = option_label(trial, part, OF_TRIALS)
    score = format_score(trial["score"])
    if trial["status"] != "ok":
        score = str(trial["status"])
    return (
        join_options(trial["method"], label),
        score,
        format_count(trial["num_eval_rows"]),
        f"yes{_at_end(trial, part)}" if _is_chosen(trial, results) else NOTHING,
    )


def _at_end(trial: "pd.Series[Any]", part: pd.DataFrame) -> str:
    """Return words for a value beyond which nothing was tried; "" if there is none."""
    its = part[part["method"].eq(trial["method"])]
    ends = []
    for name in varying(its, OPTIONS):
        values = its[name].dropna()
        if not pd.api.types.is_numeric_dtype(values) or values.nunique() < 3:
            continue
        for end, word in ((values.min(), "smallest"), (values.max(), "largest")):
            if trial[name] == end:
                ends.append(f"the {word} {name} tried")
    return "".join(f", {end}" for end in ends)


def _is_chosen(trial: "pd.Series[Any]", results: pd.DataFrame) -> bool:
    """Return whether a result agrees with a trial in all but seed and rows."""
    same = results
    for name in ("method", *WORKLOAD, *OPTIONS):
        if name in OF_TRIALS:
            continue
        value = trial[name]
        is_same = same[name].isna() if pd.isna(value) else same[name].eq(value)
        same = same[is_same.fillna(False).astype(bool)]
    return not same.empty
