"""Exactness: errors of the rebuilt activations and their gradients."""

from typing import Any

import pandas as pd

from meft_reports.format import NOTHING, format_count, format_error
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    prepare,
    settings,
    split,
    worst,
)
from meft_reports.tables.table import (
    METHOD,
    NUM_CELLS,
    WORKLOAD_NAME,
    Heading,
    Table,
    join_options,
)

COLUMNS = (
    METHOD,
    WORKLOAD_NAME,
    Heading("blocks", "Number of blocks of the model."),
    Heading(
        "worst reconstruction error",
        "Largest relative error of the rebuilt streams, over blocks and cells.",
    ),
    Heading(
        "worst gradient error",
        "Largest relative error of a gradient against the twin that stores its "
        "activations, over blocks and cells.",
    ),
    Heading(
        "of the twin, run twice",
        "Largest relative difference of the twin's gradients between two runs.",
    ),
    Heading(
        "blocks with gradient error below 1 %",
        "Number of blocks whose gradients are that close, of all blocks.",
    ),
    NUM_CELLS,
)
IGNORED = ("reference", "max_steps", "warmup_steps")
"""Options of timing, which have no effect on the error of an inverse."""


NEEDS = (
    "ok cells of a MEFT method that measured the error of rebuilt streams or of "
    "gradients"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return the largest errors of the rebuilt backward, over all blocks and seeds."""
    rows = prepare(frame)
    known = rows["reconstruction_error"].notna() | rows["gradient_error"].notna()
    rows = rows[known & (rows["status"] == "ok")]
    if rows.empty:
        return []
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    cells = []
    for _, part in split(rows, [*WORKLOAD, *PROVENANCE]):
        for same in settings(part, ignoring=IGNORED):
            first = same.iloc[0]
            cells.append(
                (
                    join_options(first["method"], option_label(first, part, IGNORED)),
                    describe(same, shown),
                    format_count(same["num_blocks"].max()),
                    format_error(worst(same["reconstruction_error"])),
                    format_error(worst(same["gradient_error"])),
                    format_error(worst(same["repeat_error"])),
                    _blocks_kept(same["gradient_error"]),
                    format_count(len(same)),
                )
            )
    return [
        Table(
            title="Exactness of the rebuilt backward",
            columns=COLUMNS,
            rows=tuple(cells),
            num_text_columns=2,
            notes=(
                "Relative errors, measured; the greatest over blocks and seeds. Where "
                "the stored twin gives other gradients when it runs twice, a kernel "
                "sums in an order that varies, and errors of that size are its own.",
            ),
        )
    ]


def _blocks_kept(lists: "pd.Series[Any]") -> str:
    counts = {(sum(e < 0.01 for e in errors), len(errors)) for errors in lists.dropna()}
    return ", ".join(f"{kept} of {total}" for kept, total in sorted(counts)) or NOTHING
