"""Origins of the weights and of the rows."""

import pandas as pd

from meft_reports.format import format_count, format_fact
from meft_reports.summary import has_random_weights, on_random_input, split
from meft_reports.tables.table import Table

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
        (*map(format_fact, key.values()), format_count(len(part)))
        for key, part in split(ok, fields)
    ]
    return [
        Table(
            title="Weights",
            header=("backbone", "origin", "sha256", "cells"),
            rows=tuple(rows),
            num_text_columns=3,
        ),
        Table(
            title="Data",
            header=(
                "task",
                "origin and splits",
                "rows trained on",
                "scored on",
                "cells",
            ),
            rows=tuple(data),
            num_text_columns=2,
        ),
    ]
