"""Traffic: transfers of sparse adapters between host and device per optimizer step.

Measured bytes are counted copy by copy. They are compared with two formulas for the
same batches: the paper's accounting, where active rows are copied to the device, and
their gradients and the hidden states to the host in every batch, and that of an
offloaded dense adapter, all of whose rows and gradients are copied in every batch.
"""

import statistics
from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_count,
    format_percent,
    format_ratio,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    mean_list,
    prepare,
    settings,
    split,
)
from meft_reports.tables.table import Table, join_options, notes_on

IN_COLUMNS = ("num_neurons", "accumulation", "reference", "max_steps", "warmup_steps")
HEADER = (
    "method",
    "neurons",
    "batches a step",
    "up",
    "down",
    "moved / paper's",
    "moved / dense offload's",
    "found on the device",
    "share active in a batch, mean (least to most of a block)",
    "slots on the device",
    "store on the host",
    "step ratio, median (IQR)",
    "cells",
)
NOTES = (
    "Up is host to device, down is device to host, all blocks, one optimizer step in "
    "the long run; index numbers are in them. The paper's bytes and dense offload's "
    "are formulas, with numbers of the same size.",
    "A step ratio is only shown where both methods' steps were timed interleaved in "
    "one process; its reference is named behind it.",
)


NEEDS = (
    "cells of a method with rows of neurons, such as sparse, which counted its "
    "transfers"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload with adapters whose rows can be transferred."""
    rows = prepare(frame)
    rows = rows[rows["paper_transfer_bytes"].notna()]
    if rows.empty:
        return []
    shown = fields_to_show(rows, always=("task", "backbone", "dtype", "batch_size"))
    return [
        _table(part, describe(part, shown))
        for _, part in split(rows, [*WORKLOAD, *PROVENANCE])
    ]


def _table(part: pd.DataFrame, workload: str) -> Table:
    rows = []
    for setting in settings(part, ignoring=IN_COLUMNS):
        first = setting.iloc[0]
        name = join_options(first["method"], option_label(first, part, IN_COLUMNS))
        for key, cells in split(setting, ["num_neurons", "accumulation"]):
            rows.append((name, *map(format_count, key.values()), *_row(cells)))
    return Table(
        title=f"Rows of sparse adapters · {workload}",
        header=HEADER,
        rows=tuple(rows),
        notes=(*NOTES, *notes_on(part)),
    )


def _row(cells: pd.DataFrame) -> tuple[str, ...]:
    moved = cells["transfer_bytes"].mean()
    return (
        _bytes(cells["h2d_bytes"].mean()),
        _bytes(cells["d2h_bytes"].mean()),
        _by(moved, cells["paper_transfer_bytes"].mean()),
        _by(moved, cells["dense_transfer_bytes"].mean()),
        format_percent(_none(cells["cache_hit_fraction"].mean())),
        _shares(cells["union_fraction"].dropna()),
        _bytes(cells["row_device_bytes"].mean()),
        _bytes(cells["row_store_bytes"].mean()),
        _step_ratio(cells),
        str(len(cells)),
    )


def _shares(lists: "pd.Series[Any]") -> str:
    """Return shares of a block's neurons; blocks are averaged over cells first."""
    if lists.empty:
        return NOTHING
    blocks = mean_list(lists)
    low, high = format_percent(min(blocks)), format_percent(max(blocks))
    return f"{format_percent(statistics.fmean(blocks))} ({low} to {high})"


def _step_ratio(cells: pd.DataFrame) -> str:
    ratio, iqr = cells["step_ratio"].mean(), cells["step_ratio_iqr"].mean()
    if is_null(ratio):
        return NOTHING
    reference = ", ".join(sorted(cells["reference"].unique()))
    return f"{format_ratio(ratio)} ({format_ratio(iqr)}) of {reference}"


def _none(value: Any) -> float | None:
    return None if is_null(value) else float(value)


def _bytes(value: Any) -> str:
    return format_bytes(_none(value))


def _by(moved: Any, formula: Any) -> str:
    if is_null(moved) or is_null(formula) or not formula:
        return NOTHING
    return format_ratio(float(moved) / float(formula))
