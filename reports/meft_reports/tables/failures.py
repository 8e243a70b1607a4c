"""Failures: every cell that did not end well, and why; and notes on others.

Answers of `fit` that nothing fits are listed apart, as no cell of theirs has run.
"""

import pandas as pd

from meft_reports.format import format_seconds, format_text
from meft_reports.searches import found_nothing
from meft_reports.summary import by_method, has_random_weights
from meft_reports.tables.table import Heading, Table

NEEDS = "a cell that did not end well, or an ok cell with a message"
"""What the records must hold for there to be a table."""
COLUMNS = (
    Heading("cell", "Name of the cell."),
    Heading("status", "How the cell ended."),
    Heading("message", "Why it did not end well, or a remark on it."),
    Heading("after", "Time from the start of its process to its end."),
)


def make(frame: pd.DataFrame) -> list[Table]:
    """Return tables of cells that did not end well, and of ok cells with a note.

    A note of the harness is that the loss was not finite.
    """
    is_ok = frame["status"] == "ok"
    pairs = zip(frame["sweep"], frame["status"], strict=True)
    is_answer = pd.Series([found_nothing(*pair) for pair in pairs], frame.index, bool)
    return [
        *_table("Cells that did not end well", frame[~is_ok & ~is_answer]),
        *_table("Searches by fit in which nothing fits", frame[is_answer]),
        *_table(
            "Cells that are ok, with a remark", frame[is_ok & (frame["message"] != "")]
        ),
    ]


def _table(title: str, cells: pd.DataFrame) -> list[Table]:
    cells = by_method(cells)
    random = has_random_weights(cells)
    rows = tuple(
        (
            f"{row['cell_id']} (random weights)" if is_random else row["cell_id"],
            row["status"],
            format_text(row["message"]),
            format_seconds(row["wall_seconds"]),
        )
        for (_, row), is_random in zip(cells.iterrows(), random, strict=True)
    )
    if not rows:
        return []
    return [
        Table(
            title=title,
            columns=COLUMNS,
            rows=rows,
            num_text_columns=3,
        )
    ]
