"""Cells as plain Python values: one dictionary per row of the frame.

Pandas is slow row by row, and JSON has neither `NA` nor NaN, so what the page shows is
computed from dictionaries in which every unknown number is None.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from meft_reports.columns import COLUMNS
from meft_reports.searches import FIELDS, SEARCHES, options_in_words
from meft_reports.summary import FLAGS, TRIAL, prepare

Cell = dict[str, Any]
"""Columns of the frame by name; in those of `comparable_cells` also `FLAGS`."""

FACTS = (
    *("cell_id", "sweep", "sweep_question", "sweep_caveats", "status", "message"),
    "started_at",
    *("source", "method", "backbone", "task", "device", "max_steps", "reference"),
    *("learning_rate", "active_fraction", "scored_on", "python_version"),
    "torch_version",
    *("transformers_version", "peft_version", "commit", "dirty", "code_sha256"),
    *("machine", "platform", "cpu", "num_threads", "num_slots", "device_name"),
    "is_gpu_shared",
    *("prediction", "weights_origin", "weights_sha256", "data_origin"),
    *("step_seconds", "score", "majority_score", "num_eval_rows"),
    "num_foreign_processes",
)
"""Columns that sentences on single cells need."""

LARGEST = "largest"
"""Value of the field that a search has maximized."""
UNTRAINED_RATE = 1e-9
"""A cell with a smaller learning rate measures its method's starting point."""


def all_cells(frame: pd.DataFrame) -> list[Cell]:
    """Return every cell of the frame with `FACTS`, in its order."""
    return _rows(frame, FACTS)


def columns_of(frame: pd.DataFrame, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return columns of the frame as lists of plain values."""
    found = {}
    for name in names:
        series = frame[name]
        found[name] = series.astype(object).where(series.notna(), None).tolist()
    return found


def comparable_cells(frame: pd.DataFrame) -> list[Cell]:
    """Return the cells in the form that comparisons require, as `prepare` defines it.

    `index` is the position of the cell in `all_cells`. An option that the cell's method
    does not use is None. The value that a search has found is `LARGEST`, because it is
    the answer and no property of the workload; `search` has the options of the search.
    """
    rows = prepare(frame.reset_index(drop=True))
    names = [c.name for c in COLUMNS if c.section != "versions" or c.key == "torch"]
    cells = _rows(rows, [*names, *FLAGS])
    options = options_in_words(
        cell["sweep_caveats"] or "" for cell in cells if cell["sweep"] in SEARCHES
    )
    for cell, index in zip(cells, rows.index, strict=True):
        cell["index"] = int(index)
        cell["search"] = ""
        if is_answer(cell):
            cell[FIELDS[cell["sweep"]]] = LARGEST
            asked = options[cell["sweep_caveats"] or ""]
            cell["search"] = f"{cell['sweep']} {asked}".strip()
    return cells


def is_answer(cell: Cell) -> bool:
    """Return whether the cell is the answer of a search, with the value that fits."""
    return cell["sweep"] in SEARCHES


def is_of_trial(cell: Cell) -> bool:
    """Return whether the cell is a trial, which chooses a value and is no result."""
    return bool(cell["scored_on"] == TRIAL)


def is_trained(cell: Cell) -> bool:
    """Return whether the cell learns a real task, not only starts or times it."""
    return (
        not cell["task"].startswith("synthetic")
        and cell["max_steps"] > 1
        and cell["learning_rate"] > UNTRAINED_RATE
        and not cell["reference"]
        and not is_of_trial(cell)
    )


def is_untrained(cell: Cell) -> bool:
    """Return whether the cell's score is that of its method's starting point."""
    return (
        not cell["task"].startswith("synthetic")
        and cell["learning_rate"] <= UNTRAINED_RATE
    )


def is_assumed(cell: Cell) -> bool:
    """Return whether the share of active neurons was declared, not observed."""
    return (cell["active_fraction"] or 1.0) < 1.0


def is_predicted(cell: Cell) -> bool:
    """Return whether the numbers of the cell were predicted, not measured."""
    return bool(cell["source"] == "predicted")


def _rows(frame: pd.DataFrame, names: Sequence[str]) -> list[Cell]:
    values = zip(*columns_of(frame, names).values(), strict=True)
    return [dict(zip(names, row, strict=True)) for row in values]
