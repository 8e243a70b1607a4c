"""A column over the commits of its records, with the steps that it made.

    meft1-exact/random:bert-tiny/…  peak_allocated_bytes
      2026-11-20  3f2a91bc   19,324,856 bytes (18.4 MiB)
      2026-11-27  931d041a   19,511,224 bytes (18.6 MiB)  +186,368 bytes, +0.96 %

Of each cell, records of ok runs are ordered by the time at which they started; those of
one code are one line, with their last value. A line for each step is shown.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from meft_reports.columns.column import Column
from meft_reports.compared import Number, compared_number, exact
from meft_reports.format import format_value
from meft_reports.latest import code_of, in_order
from meft_reports.text import plural, printable

NOISE_SHARE = 0.05
"""Smallest change of a number with noise that is a step, as a share."""
NOISY = ("seconds",)
Record = dict[str, Any]


def history(records: Sequence[Record], column: Column, only: str = "*") -> str:
    """Return the history of a column, a paragraph for each cell in which it changed.

    Args:
        records: all records of the runs, several of a cell.
        column: the column.
        only: pattern of the ids of cells.
    """
    by_cell: dict[str, list[Record]] = {}
    for record in in_order(records):
        is_wanted = fnmatch.fnmatchcase(record["cell_id"], only)
        if is_wanted and record["status"] == "ok":
            by_cell.setdefault(record["cell_id"], []).append(record)
    paragraphs = []
    num_same = 0
    for cell_id in sorted(by_cell):
        lines = _steps(by_cell[cell_id], column)
        if len(lines) > 1:
            head = f"{printable(cell_id)}  {column.name}"
            paragraphs.append("\n".join([head, *lines]))
        else:
            num_same += 1
    words = f"{plural(num_same, 'cell')} without a step"
    return "\n\n".join([*paragraphs, words])


def _steps(records: Sequence[Record], column: Column) -> list[str]:
    """Return a line for the first value, and for each that is another than before."""
    lines: list[str] = []
    before: Number | None = None
    by_code: dict[str, Record] = {}
    for record in records:
        code = f"{code_of(record)} {record['environment'].get('machine')}"
        by_code.pop(code, None)  # a code that is run again counts at its last place
        by_code[code] = record
    for record in by_code.values():
        value = compared_number(column, record["measurement"].get(column.name))
        if value is None or not math.isfinite(value):
            continue
        change = ""
        if before is not None:
            difference = exact(value) - exact(before)
            share = float(difference / exact(abs(before))) if before else math.inf
            least = NOISE_SHARE if column.unit in NOISY else 0
            if not difference or abs(share) < least:
                continue
            sign = "+" if difference > 0 else "-"
            size = format_value(abs(difference), column.unit)
            change = f"  {sign}{size}, {100 * share:+.2f} %"
        before = value
        commit = record["environment"].get("commit") or code_of(record)
        dirty = "+" if record["environment"].get("dirty") else ""
        lines.append(
            f"  {record['started_at'][:10]}  {printable(commit)[:8]}{dirty:<1}  "
            f"{format_value(value, column.unit)}{change}"
        )
    return lines
