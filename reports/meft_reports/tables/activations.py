"""Activations: memory of a step beyond the model state, by the protocol of the paper.

    rest           model state between two steps: weights, optimizer state
    activations    the peak of a step minus the model state, in GiB and in the unit of
                   the authors' code, which prints "GB" and means 1000 * 2^20 bytes
    saved          bytes that forward saves for backward, counted tensor by tensor

Source: Liao et al., NeurIPS 2023, section 4, and their code. Gradients count as
activations in these tables; in theirs they belong to the model state.
"""

from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_percent,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    on_random_input,
    prepare,
    settings,
    split,
)
from meft_reports.tables.table import METHOD, Heading, Table, join_options, notes_on

GB_OF_THE_PAPER = 1000 * 2**20
BASES = ("full", "checkpointing", "adapters-checkpointing")
"""Methods that the others are compared with."""
EXACT = "meft1-exact"
"""The method whose savings are described in a sentence."""
QUANTITIES = {
    "peak_activation_bytes": "takes {size} of activations in a step",
    "saved_bytes": "keeps {size} for backward",
}
IN_PAPER_UNIT = Heading(
    "in the paper's GB",
    "The column before, shown in the unit of the authors' code, 1000 * 2^20 bytes.",
)
ACTIVATIONS = Heading(
    "activations",
    "Peak of a step minus weights and optimizer state, the mean over cells.",
)
SAVED = Heading(
    "saved for backward",
    "Bytes that the forward pass saves for the backward pass, the mean over cells.",
)


def less_than(quantity: str) -> tuple[Heading, ...]:
    """Return columns of the savings in a quantity against each of `BASES`."""
    return tuple(
        Heading(
            f"less than {base}",
            f"Share of the {quantity} of {base} that is not needed; below 0 if more is "
            "needed, which is shown as a number of times.",
        )
        for base in BASES
    )


COLUMNS = (
    METHOD,
    Heading("peak", "Peak of allocated bytes in a step, the mean over cells."),
    IN_PAPER_UNIT,
    Heading("of it at rest", "Bytes of weights and optimizer state between steps."),
    ACTIVATIONS,
    IN_PAPER_UNIT,
    *less_than("activations"),
    SAVED,
    *less_than("bytes saved for backward"),
)
NOTES = (
    "Single steps on random input. Activations are what the peak of a step needs "
    "beyond weights and optimizer state, gradients among it. The paper's GB is "
    "1000 · 2^20 bytes. Where a method takes more than another, it is said how many "
    "times as much. A word instead of a number is how that cell failed.",
)


NEEDS = (
    f"two methods, of which one is {', '.join(BASES)}, on one workload of the task "
    "synthetic or synthetic-lm, without a `reference`"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload that has a method to compare with."""
    return [_table(part, workload) for workload, part in workloads(frame)]


def workloads(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return each workload on random input with a method of `BASES`, by description."""
    rows = prepare(frame)
    rows = rows[on_random_input(rows) & (rows["reference"] == "")]
    always = ("task", "backbone", "dtype", "batch_size", "device")
    shown = fields_to_show(rows, always=always)
    return [
        (describe(part, shown), part)
        for _, part in split(rows, [*WORKLOAD, *PROVENANCE])
        if part["method"].isin(BASES).any() and part["method"].nunique() > 1
    ]


def _table(part: pd.DataFrame, workload: str) -> Table:
    bases = bases_of(part)
    rows = []
    for same in settings(part):
        first = same.iloc[0]
        name = join_options(first["method"], option_label(first, part))
        rows.append((name, *_row(same, bases)))
    return Table(
        title=f"Activations · {workload}",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=(*_sentences(part, bases), *NOTES, *notes_on(part)),
    )


def bases_of(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the ok cells of each of `BASES` with a measured peak."""
    measured = part[(part["status"] == "ok") & part["peak_activation_bytes"].notna()]
    return {base: measured[measured["method"] == base] for base in BASES}


def ends_of(part: pd.DataFrame) -> dict[str, str]:
    """Return how each method ended: `ok` if any of its cells did."""
    return {
        str(method): "ok" if "ok" in set(statuses) else statuses.iloc[0]
        for method, statuses in part.groupby("method")["status"]
    }


def _row(same: pd.DataFrame, bases: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    ok = same[same["status"] == "ok"]
    if ok.empty:
        return (same["status"].iloc[0], *[NOTHING] * (len(COLUMNS) - 2))
    cells: list[str] = []
    for name in ("peak_allocated_bytes", "peak_activation_bytes", "saved_bytes"):
        mean = ok[name].mean()
        cells.append(format_bytes(mean))
        if name != "saved_bytes":
            cells.append(in_paper_unit(mean))
        if name == "peak_allocated_bytes":
            cells.append(format_bytes(ok["model_state_bytes"].mean()))
            continue
        cells += [less(mean, base[name].mean()) for base in bases.values()]
    return tuple(cells)


def _sentences(part: pd.DataFrame, bases: dict[str, pd.DataFrame]) -> list[str]:
    """Return sentences about the savings of the exact inverse, or how it ended."""
    ends = ends_of(part)
    if EXACT not in ends:
        return []
    if ends[EXACT] != "ok":
        return [f"{EXACT} ended as {ends[EXACT]}."]
    own = part[part["method"] == EXACT]
    sentences = []
    for name, words in QUANTITIES.items():
        mean = own[name].mean()
        compared = [
            _compared(mean, base[name].mean(), method, ends[method])
            for method, base in bases.items()
            if method in ends
        ]
        if compared and not is_null(mean):
            text = words.format(size=format_bytes(mean))
            sentences.append(f"{EXACT} {text}: {', '.join(compared)}.")
    return sentences


def _compared(value: Any, base: Any, method: str, end: str) -> str:
    if is_null(base):
        return f"{method} ended as {end}"
    than = "" if value > base else "less than "
    return f"{less(value, base)} {than}{method}"


def in_paper_unit(num_bytes: Any) -> str:
    """Format a size in units of 1000 * 2^20 bytes."""
    if is_null(num_bytes):
        return NOTHING
    return ShownNumber(f"{num_bytes / GB_OF_THE_PAPER:.2f}", "bytes", num_bytes)


def less(value: Any, base: Any) -> str:
    """Format by how much `value` is less than `base`, or how many times larger it is.

    The result is a dash if both are equal, or if `base` is 0 bytes.
    """
    if is_null(value) or is_null(base) or base in (0, value):
        return NOTHING
    share = 1 - value / base
    if value > base:
        return ShownNumber(f"{value / base:.1f} times", "fraction", share)
    return format_percent(share)
