"""Failures: every cell that did not end well, and why."""

import pandas as pd

from meft_reports.format import format_seconds, format_text
from meft_reports.summary import by_method, has_random_weights
from meft_reports.tables.table import Table


def make(frame: pd.DataFrame) -> list[Table]:
    """Every cell that did not end well, and why."""
    failed = by_method(frame[frame["status"] != "ok"])
    random = has_random_weights(failed)
    rows = tuple(
        (
            f"{row['cell_id']} (random weights)" if is_random else row["cell_id"],
            row["status"],
            format_text(row["message"]),
            format_seconds(row["wall_seconds"]),
        )
        for (_, row), is_random in zip(failed.iterrows(), random, strict=True)
    )
    if not rows:
        return []
    return [
        Table(
            title="Cells that did not end well",
            header=("cell", "status", "message", "after"),
            rows=rows,
            num_text_columns=3,
        )
    ]
