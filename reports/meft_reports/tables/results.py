"""Results: score, memory and time of each method on each real task."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    ShownNumber,
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
from meft_reports.tables.table import (
    METHOD,
    Heading,
    Table,
    join_options,
    notes_on,
    notes_on_scores,
)

SIZES = {
    "saved for backward": ("saved_bytes", "Bytes that forward saves for backward"),
    "peak allocated": ("peak_allocated_bytes", "Peak of allocated bytes in a step"),
    "peak reserved": ("peak_reserved_bytes", "Peak of reserved bytes in a step"),
    "model state": ("model_state_bytes", "Bytes of weights and optimizer state"),
    "host peak": ("peak_host_bytes", "Peak of the process in host memory"),
}
"""Columns of bytes by name: the column of the frame, and its meaning."""
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
    columns: dict[Heading, Callable[[Any], str]] = {
        METHOD: lambda row: join_options(row["method"], option_label(row, part)),
        Heading("seeds", "Number of seeds, of all if some failed."): _seeds,
        Heading(
            f"score ({format_text(metric)})", "Score of the task, the mean over seeds."
        ): lambda row: _score(row, "score"),
        Heading(
            "majority class", "Score of always answering the most frequent label."
        ): lambda row: format_score(row["majority_score"]),
        **_further(second_metric, "second_"),
        **_further(third_metric, "third_"),
        Heading("trainable", "Number of trained parameters."): lambda row: format_count(
            row["num_trainable_parameters"]
        ),
        Heading(
            "share", "Share of trained parameters of all parameters."
        ): lambda row: format_percent(row["trainable_fraction"]),
        **{
            Heading(name, f"{meaning}, the mean over seeds."): partial(
                _bytes, name=column
            )
            for name, (column, meaning) in SIZES.items()
            # Reserved bytes are measured on a GPU only.
            if name != "peak reserved" or part[column].notna().any()
        },
        Heading(
            "step, median (IQR)", "Median time of a step, the mean over seeds."
        ): _step,
    }
    return Table(
        title=title,
        columns=tuple(columns),
        rows=tuple(
            tuple(cell(row) for cell in columns.values()) for _, row in part.iterrows()
        ),
        notes=(
            "All numbers are measured. Mean over seeds ± sample standard deviation.",
            *notes_on(part),
            *notes_on_scores(part),
        ),
    )


def _further(metric: Any, rank: str) -> dict[Heading, Callable[[Any], str]]:
    """Return columns of the metric's second or third value; empty if it has none."""
    if is_null(metric):
        return {}
    return {
        Heading(
            f"score ({format_text(metric)})",
            "Further value of the task's metric, the mean over seeds.",
        ): lambda row: _score(row, f"{rank}score"),
        Heading(
            f"majority class ({format_text(metric)})",
            "That value for always answering the most frequent label.",
        ): lambda row: format_score(row[f"{rank}majority_score"]),
    }


def _seeds(row: "pd.Series[Any]") -> str:
    ok, failed = row["num_seeds"], row["num_failed"]
    if not failed:
        return format_count(ok)
    return ShownNumber(f"{ok} of {ok + failed} ({failed} failed)", "count", ok)


def _score(row: "pd.Series[Any]", name: str) -> str:
    return format_mean(row[name], row[f"{name}_spread"])


def _bytes(row: "pd.Series[Any]", name: str) -> str:
    return format_bytes_spread(row[name], row[f"{name}_spread"])


def _step(row: "pd.Series[Any]") -> str:
    if is_null(row["step_seconds"]):
        return NOTHING
    iqr = format_seconds(row["step_seconds_iqr"])
    text = f"{format_seconds(row['step_seconds'])} ({iqr})"
    return ShownNumber(
        text, "seconds", row["step_seconds"], IQR=row["step_seconds_iqr"]
    )
