"""Predictions held against the GPU itself: the same cell on both, peak by peak.

A pair is one cell that ran on `cuda` and on the virtual GPU of the same name.
"""

from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_bytes, format_count, is_null
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import OPTIONS, WORKLOAD, prepare
from meft_reports.tables.table import Table, join_options

COMPARED = ("saved_bytes", "peak_allocated_bytes", "peak_reserved_bytes")
HEADER = (
    "method",
    "workload",
    "saved, measured",
    "predicted",
    "error",
    "allocated, measured",
    "predicted",
    "error",
    "reserved, measured",
    "predicted",
    "error",
    "seed",
)
NOTES = (
    "Measured by `torch.cuda`, predicted by fake tensors and a model of the caching "
    "allocator. An error above 0 is a prediction that is too high.",
)


def make(frame: pd.DataFrame) -> list[Table]:
    """One table per GPU that ran cells which its virtual twin ran too."""
    rows = prepare(frame)
    rows = rows[(rows["status"] == "ok") & rows["device_name"].notna()]
    tables = []
    for name, part in rows.groupby("device_name", sort=True):
        found = _pairs(part)
        if found:
            title = f"Predictions held against {name}"
            tables.append(
                Table(
                    title=title,
                    header=HEADER,
                    rows=tuple(found),
                    num_text_columns=2,
                    notes=NOTES,
                )
            )
    return tables


def _pairs(part: pd.DataFrame) -> list[tuple[str, ...]]:
    predicted = {
        _key(row): row for _, row in part[part["source"] == "predicted"].iterrows()
    }
    measured = part[(part["source"] == "measured") & (part["device"] == "cuda")]
    shown = fields_to_show(part, always=("task", "backbone", "dtype", "batch_size"))
    shown = [name for name in shown if name in WORKLOAD and name != "device"]
    return [
        (
            join_options(row["method"], option_label(row, measured)),
            describe(measured.loc[[index]], shown),
            *_compared(row, predicted[_key(row)]),
            format_count(row["seed"]),
        )
        for index, row in measured.iterrows()
        if _key(row) in predicted
    ]


def _key(row: "pd.Series[Any]") -> tuple[Any, ...]:
    """All that a cell is but for its device."""
    names = [n for n in (*WORKLOAD, *OPTIONS, "method", "seed") if n != "device"]
    return tuple(None if is_null(row[name]) else row[name] for name in names)


def _compared(
    measured: "pd.Series[Any]", predicted: "pd.Series[Any]"
) -> tuple[str, ...]:
    cells: list[str] = []
    for name in COMPARED:
        one, other = measured[name], predicted[name]
        cells += [format_bytes(one), format_bytes(other)]
        known = not is_null(one) and not is_null(other) and one
        cells.append(f"{100 * (other / one - 1):+.2f} %" if known else NOTHING)
    return tuple(cells)
