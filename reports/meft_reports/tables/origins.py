"""Origins of the weights and of the rows."""

import pandas as pd

from meft_reports.format import format_count, format_fact
from meft_reports.summary import has_random_weights, on_random_input, split
from meft_reports.tables.table import NUM_CELLS, Heading, Table

NEEDS = "any cell"
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return the tables of the origins of weights and of rows."""
    random = has_random_weights(frame)
    named = frame.assign(
        weights_origin=frame["weights_origin"].where(~random, "random weights")
    )
    weights = split(named, ["backbone", "weights_origin", "weights_sha256"])
    rows = [
        (*map(format_fact, key.values()), format_count(len(part)))
        for key, part in weights
    ]
    ok = frame[(frame["status"] == "ok") & ~on_random_input(frame)]
    fields = ["task", "data_origin", "num_train_rows", "num_eval_rows"]
    data = [
        (
            *map(format_fact, (key["task"], key["data_origin"])),
            *map(format_count, (key["num_train_rows"], key["num_eval_rows"])),
            format_count(len(part)),
        )
        for key, part in split(ok, fields)
    ]
    return [
        Table(
            title="Weights",
            columns=(
                Heading("backbone", "Name of the backbone in the cells."),
                Heading("origin", "Where its weights come from."),
                Heading("sha256", "Digest of the weights."),
                NUM_CELLS,
            ),
            rows=tuple(rows),
            num_text_columns=3,
        ),
        Table(
            title="Data",
            columns=(
                Heading("task", "Name of the task."),
                Heading("origin and splits", "Where its rows come from."),
                Heading("rows trained on", "Number of rows of training."),
                Heading("scored on", "Number of rows of the score."),
                NUM_CELLS,
            ),
            rows=tuple(data),
            num_text_columns=2,
        ),
    ]
