"""Twins: whether a method that rebuilds trains exactly as its plain twin does.

Two cells are a pair when they differ only in the backward, rebuilt or stored. The twin
stores every block, so the method may rebuild any number of them.
"""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_count, format_mean, format_part, is_null
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.methods import is_meft, is_stored, rebuilt
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
    WORKLOAD_NAME,
    Heading,
    Table,
    join_options,
    notes_on,
)

MAY_DIFFER = ("reversible_blocks", "side_buffer", "reference")
PLACE = (*WORKLOAD, *PROVENANCE)
COLUMNS = (
    METHOD,
    WORKLOAD_NAME,
    Heading(
        "runs equal in every step",
        "Number of runs whose losses are those of the twin, of all runs.",
    ),
    Heading(
        "losses equal in every digit",
        "Number of losses that are equal to those of the twin, of all losses.",
    ),
    Heading(
        "first step that differs",
        "Earliest step with a loss that differs, counted from 1.",
    ),
    Heading("score, rebuilt", "Score of the method, the mean over seeds."),
    Heading("score, stored", "Score of its stored twin, the mean over seeds."),
)
NOTES = (
    "Training loss, step by step, against the same cell with `-store`: the same "
    "function and seed under ordinary autograd. The first step that differs is the "
    "earliest over seeds, counted from 1. Mean of scores over seeds ± sample standard "
    "deviation.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One method and its plain twin, trained on the same rows."""

    num_compared: int
    num_equal: int
    first_difference: int | None
    """Step, counted from 1; None where there is none."""
    score: float
    twin_score: float


NEEDS = (
    "ok cells of a MEFT method and of its `-store` twin with the same options and "
    "seed, of a task other than synthetic and synthetic-lm"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table; a row per method, options and workload, over seeds."""
    rows = prepare(frame)
    rows = learned(rows)
    rows = rows[rows["status"] == "ok"]
    rows = rows[rows["method"].map(is_meft).astype(bool) & rows["loss_curve"].notna()]
    found = [
        (option_label(setting.iloc[0], part), setting, pairs)
        for _, part in split(rows, PLACE)
        for setting in settings(part[~part["method"].map(is_stored).astype(bool)])
        if (pairs := _pairs(setting, part))
    ]
    if not found:
        return []
    drawn = pd.concat([setting for _, setting, _ in found])
    shown = fields_to_show(drawn, always=("task", "backbone", "dtype"))
    return [
        Table(
            title="Rebuilt against stored: training losses of the plain twins",
            columns=COLUMNS,
            rows=tuple(
                (
                    join_options(setting["method"].iloc[0], options),
                    describe(setting, shown),
                    *_row(pairs),
                )
                for options, setting, pairs in found
            ),
            num_text_columns=2,
            notes=(*NOTES, *notes_on(drawn)),
        )
    ]


def _pairs(setting: pd.DataFrame, part: pd.DataFrame) -> list[Pair]:
    twins = {_key(row): row for _, row in part.iterrows() if is_stored(row["method"])}
    return [
        _pair(row, twins[_key(row)])
        for _, row in setting.iterrows()
        if _key(row) in twins
    ]


def _key(row: "pd.Series[Any]") -> tuple[Any, ...]:
    """Return the fields that twins have in common, within one `PLACE`."""
    names = [name for name in OPTIONS if name not in MAY_DIFFER]
    options = [None if is_null(row[name]) else row[name] for name in names]
    return (rebuilt(row["method"]), row["seed"], *options)


def _pair(row: "pd.Series[Any]", twin: "pd.Series[Any]") -> Pair:
    mine, its = row["loss_curve"], twin["loss_curve"]
    # A step that only one of the two took is a step in which they differ.
    num_steps = max(len(mine), len(its))
    differing = [
        step
        for step in range(num_steps)
        if step >= min(len(mine), len(its)) or not _equal(mine[step], its[step])
    ]
    return Pair(
        num_compared=num_steps,
        num_equal=num_steps - len(differing),
        first_difference=differing[0] + 1 if differing else None,
        score=row["score"],
        twin_score=twin["score"],
    )


def _equal(one: float, other: float) -> bool:
    # Losses that were not finite are equal: both failed in the same step.
    return one == other or (math.isnan(one) and math.isnan(other))


def _row(pairs: list[Pair]) -> tuple[str, ...]:
    whole = sum(pair.first_difference is None for pair in pairs)
    equal = sum(pair.num_equal for pair in pairs)
    compared = sum(pair.num_compared for pair in pairs)
    steps = [p.first_difference for p in pairs if p.first_difference is not None]
    return (
        format_part(whole, len(pairs)),
        format_part(equal, compared),
        format_count(min(steps)) if steps else NOTHING,
        _score([pair.score for pair in pairs]),
        _score([pair.twin_score for pair in pairs]),
    )


def _score(scores: list[float]) -> str:
    known = [float(score) for score in scores if not is_null(score)]
    if not known:
        return NOTHING
    return format_mean(sum(known) / len(known), spread(known))
