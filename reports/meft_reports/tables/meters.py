"""Meters of a real GPU, side by side: memory, traffic and power of one step.

    memory    as torch's allocator, NVML and the driver count it
    traffic   by the method's ledger, by torch's profiler, by NVML's counters
    power     energy of a step, mean power, and why clocks were lowered

Different meters of one thing answer different questions (docs/numbers.md), and are
never added up. Of a cell that shared its GPU, what depends on others is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from meft_reports.contaminated import NUM_FOREIGN
from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_count,
    format_seconds,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import PROVENANCE, WORKLOAD, prepare, settings, split
from meft_reports.tables.table import (
    METHOD,
    NUM_CELLS,
    Heading,
    Table,
    join_options,
    notes_on,
)

NEEDS = "ok cells on a real GPU, of which NVML or torch's profiler measured something"
"""What the records must hold for there to be a table."""

MEMORY = {
    "peak_requested_bytes": ("requested", "Peak of the bytes that tensors request."),
    "peak_allocated_bytes": ("allocated", "Peak of the blocks in use."),
    "peak_active_bytes": ("active", "Peak of the blocks that may still be used."),
    "peak_reserved_bytes": ("reserved", "Peak of what the allocator has reserved."),
    "context_bytes": ("context", "Bytes of the CUDA context at the start."),
    "nvml_process_bytes": ("process", "Bytes of the process by NVML."),
    "nvml_device_bytes": ("device", "Bytes of all processes and the driver by NVML."),
    "peak_pinned_bytes": ("pinned host", "Peak of page-locked host memory."),
}
TRAFFIC = {
    "h2d_bytes": ("up: ledger", "Bytes to the device by the method's ledger."),
    "profiled_h2d_bytes": ("up: profiler", "Bytes of all copies to the device."),
    "pcie_rx_bytes": ("up: link", "Bytes that the device received over its link."),
    "d2h_bytes": ("down: ledger", "Bytes to the host by the method's ledger."),
    "profiled_d2h_bytes": ("down: profiler", "Bytes of all copies to the host."),
    "pcie_tx_bytes": ("down: link", "Bytes that the device sent over its link."),
    "profiled_pageable_bytes": (
        "of pageable memory",
        "Bytes of copies from or to memory that is not page-locked.",
    ),
}
POWER_COLUMNS = (
    Heading("step", "Median time of a step."),
    Heading("energy of a step", "Mean energy of a step in joules."),
    Heading("mean power", "Mean power during the steps in watts."),
    Heading("clocks lowered by", "Why clocks were lowered during the steps."),
    Heading("foreign processes", "Other processes that used the GPU at the same time."),
)
CONTAMINATED = (
    "Other processes used the GPU of some cells (contaminated): their times, energy, "
    "and bytes of the whole GPU and its link are left out."
)
MEASURED = (
    *("context_bytes", "nvml_process_bytes", "nvml_device_bytes"),
    *("profiled_h2d_bytes", "pcie_rx_bytes", "pcie_tx_bytes"),
    *("step_energy_joules", "throttle_reasons", NUM_FOREIGN),
)
"""Columns of which a row needs one."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return three tables per workload: memory, traffic, power."""
    rows = prepare(frame)
    rows = rows[(rows["status"] == "ok") & rows[list(MEASURED)].notna().any(axis=1)]
    if rows.empty:
        return []
    shown = fields_to_show(rows, always=("task", "backbone", "dtype", "batch_size"))
    return [
        table
        for _, part in split(rows, [*WORKLOAD, *PROVENANCE])
        for table in _tables(part, describe(part, shown))
    ]


def _tables(part: pd.DataFrame, workload: str) -> list[Table]:
    return [
        _table(
            f"Memory by its meters · {workload}",
            part,
            [Heading(*words) for words in MEMORY.values()],
            lambda cells: [_bytes(cells[name]) for name in MEMORY],
            [
                "Peaks of one step, the mean over cells. Allocated and reserved are "
                "torch's; process and device are NVML's, after the peak."
            ],
        ),
        _table(
            f"Traffic of a step by its meters · {workload}",
            part,
            [Heading(*words) for words in TRAFFIC.values()],
            lambda cells: [_bytes(cells[name]) for name in TRAFFIC],
            [
                "Up is host to device, down is device to host. The profiler sees all "
                "copies of the process; the link also moves headers and commands, "
                f"measured by {_sources(part)}."
            ],
        ),
        _table(
            f"Power · {workload}",
            part,
            POWER_COLUMNS,
            _power,
            ["The steps after warm-up, without what happens between them."],
        ),
    ]


def _table(
    title: str,
    part: pd.DataFrame,
    headings: Sequence[Heading],
    row_of: Callable[[pd.DataFrame], list[str]],
    notes: Sequence[str],
) -> Table:
    rows = []
    for cells in settings(part):
        first = cells.iloc[0]
        name = join_options(first["method"], option_label(first, part))
        rows.append((name, *row_of(cells), format_count(len(cells))))
    is_contaminated = (part[NUM_FOREIGN] > 0).any()
    return Table(
        title=title,
        columns=(METHOD, *headings, NUM_CELLS),
        rows=tuple(rows),
        notes=(*notes, *([CONTAMINATED] * bool(is_contaminated)), *notes_on(part)),
    )


def _bytes(column: "pd.Series[Any]") -> str:
    mean = column.mean()
    return format_bytes(None if is_null(mean) else float(mean))


def _power(cells: pd.DataFrame) -> list[str]:
    foreign = cells[NUM_FOREIGN].max()
    return [
        format_seconds(_mean(cells["step_seconds"])),
        _with_unit(cells["step_energy_joules"], "J", "joules"),
        _with_unit(cells["mean_power_watts"], "W", "watts"),
        _words(cells["throttle_reasons"]),
        NOTHING if is_null(foreign) else format_count(foreign),
    ]


def _mean(column: "pd.Series[Any]") -> float | None:
    mean = column.mean()
    return None if is_null(mean) else float(mean)


def _with_unit(column: "pd.Series[Any]", symbol: str, unit: str) -> str:
    mean = _mean(column)
    if mean is None:
        return NOTHING
    return ShownNumber(f"{mean:,.4g} {symbol}", unit, mean)


def _words(column: "pd.Series[Any]") -> str:
    words = {word for text in column.dropna() for word in text.split(", ")}
    return ", ".join(sorted(words - {"none"}) or sorted(words)) or NOTHING


def _sources(part: pd.DataFrame) -> str:
    sources = sorted(part["pcie_source"].dropna().unique())
    return " and ".join(sources) if sources else "nothing here"
