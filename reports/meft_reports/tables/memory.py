"""Memory: bytes and seconds of single steps on random input of exact shape."""

import pandas as pd

from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_seconds,
    is_null,
    with_words,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    OPTIONS,
    PROVENANCE,
    WORKLOAD,
    on_random_input,
    prepare,
    settings,
    split,
)
from meft_reports.tables.table import METHOD, Heading, Table, join_options, notes_on

MEMORY_TITLES = {
    "saved_bytes": "Saved for backward",
    "peak_allocated_bytes": "Peak allocated",
    "model_state_bytes": "Model state",
    "peak_host_bytes": "Host peak",
    "step_seconds": "Step (median)",
}


NEEDS = "cells of the task synthetic or synthetic-lm"
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per quantity, backbone and dtype: shapes are columns."""
    rows = prepare(frame)
    rows = rows[on_random_input(rows)]
    if rows.empty:
        return []
    fixed = [n for n in (*WORKLOAD, *PROVENANCE) if n not in ("batch_size", "depth")]
    always = ("task", "backbone", "dtype", "seq_len", "device")
    shown = fields_to_show(rows, always=always)
    shown = [name for name in shown if name in fixed]
    return [
        _memory_table(part, quantity, f"{words} · {describe(part, shown)}")
        for _, part in split(rows, fixed)
        for quantity, words in MEMORY_TITLES.items()
        if part[quantity].notna().any()
    ]


def _memory_table(part: pd.DataFrame, quantity: str, title: str) -> Table:
    notes = notes_on(part)
    # Every part that is split off is a copy of all its columns.
    part = part[["method", *OPTIONS, "num_blocks", "batch_size", "status", quantity]]
    shapes = {
        _shape(cells): cells for _, cells in split(part, ["num_blocks", "batch_size"])
    }
    # A reference method in the same process affects the time of this method, but not
    # its bytes.
    ignoring = () if quantity == "step_seconds" else ("reference",)
    rows = []
    for same in settings(part, ignoring):
        first = same.iloc[0]
        here = {
            _shape(cells): cells
            for _, cells in split(same, ["num_blocks", "batch_size"])
        }
        cells = [_memory_cell(here.get(shape), quantity) for shape in shapes]
        rows.append(
            (join_options(first["method"], option_label(first, part, ignoring)), *cells)
        )
    return Table(
        title=title,
        columns=(
            METHOD,
            *(
                Heading(shape, f"{title}: steps of this shape, the mean over seeds.")
                for shape in shapes
            ),
        ),
        rows=tuple(rows),
        notes=(
            "Of random input of exact shape, the mean where there are "
            "several seeds. A word instead of a number is how that cell failed.",
            *notes,
        ),
    )


def _shape(cells: pd.DataFrame) -> str:
    blocks, batch = cells["num_blocks"].iloc[0], cells["batch_size"].iloc[0]
    depth = "own depth" if is_null(blocks) else f"{blocks} blocks"
    return f"{depth}, batch {batch}"


def _memory_cell(cells: pd.DataFrame | None, quantity: str) -> str:
    if cells is None:
        return NOTHING
    format = format_seconds if quantity == "step_seconds" else format_bytes
    values = cells.loc[cells["status"] == "ok", quantity].dropna()
    failed = cells.loc[cells["status"] != "ok", "status"].tolist()
    mean = float(values.mean()) if len(values) else None
    return with_words(format(mean), failed)
