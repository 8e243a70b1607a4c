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
    ShownNumber,
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
from meft_reports.tables.table import (
    METHOD,
    NUM_CELLS,
    Heading,
    Table,
    join_options,
    notes_on,
)

IN_COLUMNS = ("num_neurons", "accumulation", "reference", "max_steps", "warmup_steps")
COLUMNS = (
    METHOD,
    Heading("neurons", "Number of neurons of the adapter of a block."),
    Heading("batches a step", "Number of micro-batches of an optimizer step."),
    Heading("up", "Bytes from host to device in an optimizer step."),
    Heading("down", "Bytes from device to host in an optimizer step."),
    Heading("moved / paper's", "Bytes moved divided by the paper's accounting."),
    Heading(
        "moved / dense offload's",
        "Bytes moved divided by those of an offloaded dense adapter.",
    ),
    Heading(
        "found on the device",
        "Share of the active rows that were on the device already.",
    ),
    Heading(
        "share active in a batch, mean (least to most of a block)",
        "Share of a block's neurons that a batch activates, the mean over blocks.",
    ),
    Heading("slots on the device", "Bytes of rows on the device."),
    Heading("store on the host", "Bytes of rows in host memory."),
    Heading(
        "step ratio, median (IQR)",
        "Time of a step divided by one of the reference, which were timed interleaved "
        "in one process.",
    ),
    NUM_CELLS,
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
        columns=COLUMNS,
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
        format_count(len(cells)),
    )


def _shares(lists: "pd.Series[Any]") -> str:
    """Return shares of a block's neurons; blocks are averaged over cells first."""
    if lists.empty:
        return NOTHING
    blocks = mean_list(lists)
    mean, low, high = statistics.fmean(blocks), min(blocks), max(blocks)
    ends = f"{format_percent(low)} to {format_percent(high)}"
    text = f"{format_percent(mean)} ({ends})"
    return ShownNumber(text, "fraction", mean, low=low, high=high)


def _step_ratio(cells: pd.DataFrame) -> str:
    ratio, iqr = cells["step_ratio"].mean(), cells["step_ratio_iqr"].mean()
    if is_null(ratio):
        return NOTHING
    reference = ", ".join(sorted(cells["reference"].unique()))
    text = f"{format_ratio(ratio)} ({format_ratio(iqr)}) of {reference}"
    return ShownNumber(text, "", ratio, IQR=iqr)


def _none(value: Any) -> float | None:
    return None if is_null(value) else float(value)


def _bytes(value: Any) -> str:
    return format_bytes(_none(value))


def _by(moved: Any, formula: Any) -> str:
    if is_null(moved) or is_null(formula) or not formula:
        return NOTHING
    return format_ratio(float(moved) / float(formula))
