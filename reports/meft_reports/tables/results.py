"""Results: score, memory and time of each method on each real task."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    format_bytes_spread,
    format_count,
    format_mean,
    format_percent,
    format_score,
    format_seconds,
    format_text,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    by_method,
    learned,
    prepare,
    split,
    summarise,
)
from meft_reports.tables.table import Table, join_options, notes_on, notes_on_scores

NEEDS = (
    "cells of a task other than synthetic and synthetic-lm, with more than one step "
    "and without a `reference`"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return score, memory and time of each method on each real task, over seeds."""
    rows = prepare(frame)
    rows = learned(rows)
    if rows.empty:
        return []
    values = [
        "score",
        "majority_score",
        "second_score",
        "second_majority_score",
        "third_score",
        "third_majority_score",
        "num_trainable_parameters",
        "trainable_fraction",
        "saved_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "model_state_bytes",
        "peak_host_bytes",
        "step_seconds",
        "step_seconds_iqr",
    ]
    table = summarise(rows, values)
    shown = fields_to_show(table, always=WORKLOAD)
    names = ["score_name", "second_score_name", "third_score_name"]
    # A task's metrics may have changed between two versions of the code.
    metrics = rows.groupby(["task", "code_sha256"])[names].first()
    return [
        _results_table(
            part,
            describe(part, shown),
            *metrics.loc[(key["task"], key["code_sha256"]), names],
        )
        for key, part in split(table, [*WORKLOAD, *PROVENANCE])
    ]


def _results_table(
    part: pd.DataFrame, title: str, metric: Any, second_metric: Any, third_metric: Any
) -> Table:
    part = by_method(part)
    header: dict[str, Callable[[Any], str]] = {
        "method": lambda row: join_options(row["method"], option_label(row, part)),
        "seeds": _seeds,
        f"score ({format_text(metric)})": lambda row: _score(row, "score"),
        "majority class": lambda row: format_score(row["majority_score"]),
        **_further(second_metric, "second_"),
        **_further(third_metric, "third_"),
        "trainable": lambda row: format_count(row["num_trainable_parameters"]),
        "share": lambda row: format_percent(row["trainable_fraction"]),
        "saved for backward": lambda row: _bytes(row, "saved_bytes"),
        "peak allocated": lambda row: _bytes(row, "peak_allocated_bytes"),
        "peak reserved": lambda row: _bytes(row, "peak_reserved_bytes"),
        "model state": lambda row: _bytes(row, "model_state_bytes"),
        "host peak": lambda row: _bytes(row, "peak_host_bytes"),
        "step, median (IQR)": _step,
    }
    if part["peak_reserved_bytes"].isna().all():  # only measured on a GPU
        del header["peak reserved"]
    return Table(
        title=title,
        header=tuple(header),
        rows=tuple(
            tuple(cell(row) for cell in header.values()) for _, row in part.iterrows()
        ),
        notes=(
            "All numbers are measured. Mean over seeds ± sample standard deviation.",
            *notes_on(part),
            *notes_on_scores(part),
        ),
    )


def _further(metric: Any, rank: str) -> dict[str, Callable[[Any], str]]:
    """Return columns of the metric's second or third value; empty if it has none."""
    if is_null(metric):
        return {}
    return {
        f"score ({format_text(metric)})": lambda row: _score(row, f"{rank}score"),
        f"majority class ({format_text(metric)})": lambda row: format_score(
            row[f"{rank}majority_score"]
        ),
    }


def _seeds(row: "pd.Series[Any]") -> str:
    total = row["num_seeds"] + row["num_failed"]
    if not row["num_failed"]:
        return str(total)
    return f"{row['num_seeds']} of {total} ({row['num_failed']} failed)"


def _score(row: "pd.Series[Any]", name: str) -> str:
    return format_mean(row[name], row[f"{name}_spread"])


def _bytes(row: "pd.Series[Any]", name: str) -> str:
    return format_bytes_spread(row[name], row[f"{name}_spread"])


def _step(row: "pd.Series[Any]") -> str:
    if is_null(row["step_seconds"]):
        return NOTHING
    iqr = format_seconds(row["step_seconds_iqr"])
    return f"{format_seconds(row['step_seconds'])} ({iqr})"
