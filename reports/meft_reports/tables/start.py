"""Start: deviation of a method from the backbone's function before the first step.

At the start, only the scales of the streams have an effect: the paper's own in floating
point, and 2^-k in the exact arithmetic.
"""

import pandas as pd

from meft_reports.deviation_at_start import PLACE, start_deviations
from meft_reports.format import format_count, format_error
from meft_reports.labels import describe, fields_to_show
from meft_reports.methods import is_exact
from meft_reports.style import method_order
from meft_reports.summary import split
from meft_reports.tables.table import METHOD, Heading, Table, notes_on

NEEDS = "ok cells of a MEFT method that measured `start_deviation`"
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload; methods and blocks down, k across."""
    rows = start_deviations(frame)
    if rows.empty:
        return []
    shown = fields_to_show(rows, always=("backbone", "dtype"))
    shown = [name for name in shown if name in PLACE]
    return [_start_table(part, describe(part, shown)) for _, part in split(rows, PLACE)]


def _start_table(part: pd.DataFrame, workload: str) -> Table:
    every_k = [int(k) for k in sorted(part["lost_bits"].dropna().unique())]
    rows = []
    for key, same in split(part, ["method", "num_blocks"]):
        own = {
            k if is_exact(key["method"]) else None: value
            for k, value in zip(same["lost_bits"], same["start_deviation"], strict=True)
        }
        cells = [format_error(own.get(k)) for k in (None, *every_k)]
        rows.append((key["method"], format_count(key["num_blocks"]), *cells))
    return Table(
        title=f"Deviation at the start · {workload}",
        columns=(
            METHOD,
            Heading("blocks", "Number of blocks of the model."),
            Heading("the paper's scales", "Deviation with the scales of the paper."),
            *(Heading(f"k={k}", f"Deviation with a scale of 2^-{k}.") for k in every_k),
        ),
        rows=tuple(sorted(rows, key=lambda row: method_order(row[0]))),
        notes=(
            "Relative deviation of the last hidden state from the backbone's, before "
            "training and without dropout. A method and its plain twin are the same "
            "function and share a row; the mean over seeds.",
            *notes_on(part),
        ),
    )
