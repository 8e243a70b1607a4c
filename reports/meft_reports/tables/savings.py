"""Savings of the exact inverse: one line per workload of the tables of activations."""

from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_bytes, is_null
from meft_reports.tables.activations import (
    ACTIVATIONS,
    BASES,
    EXACT,
    IN_PAPER_UNIT,
    NOTES,
    SAVED,
    bases_of,
    ends_of,
    in_paper_unit,
    less,
    less_than,
    workloads,
)
from meft_reports.tables.table import WORKLOAD_NAME, Table, notes_on

NEEDS = (
    f"{EXACT} and at least one of {', '.join(BASES)} on one workload of the task "
    "synthetic or synthetic-lm, without a `reference`"
)
"""What the records must hold for there to be a table."""
COLUMNS = (
    WORKLOAD_NAME,
    ACTIVATIONS,
    IN_PAPER_UNIT,
    *less_than("activations"),
    SAVED,
    *less_than("bytes saved for backward"),
)


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table, if the exact inverse ran together with a method of `BASES`."""
    parts = [
        (workload, part)
        for workload, part in workloads(frame)
        if (part["method"] == EXACT).any()
    ]
    if not parts:
        return []
    rows = tuple((workload, *_row(part)) for workload, part in parts)
    notes = notes_on(pd.concat([part for _, part in parts]))
    title = f"What {EXACT} saves"
    return [Table(title=title, columns=COLUMNS, rows=rows, notes=(*NOTES, *notes))]


def _row(part: pd.DataFrame) -> tuple[str, ...]:
    ends, bases = ends_of(part), bases_of(part)
    if ends[EXACT] != "ok":
        return (ends[EXACT], *[NOTHING] * (len(COLUMNS) - 2))
    own = part[part["method"] == EXACT]
    cells: list[str] = []
    for name in ("peak_activation_bytes", "saved_bytes"):
        mean = own[name].mean()
        cells.append(format_bytes(mean))
        if name == "peak_activation_bytes":
            cells.append(in_paper_unit(mean))
        cells += [
            _against(mean, base[name].mean(), ends.get(method, "ok"))
            for method, base in bases.items()
        ]
    return tuple(cells)


def _against(mean: Any, base: Any, end: str) -> str:
    return less(mean, base) if end == "ok" or not is_null(base) else end
