"""A column over the commits of its records, with the steps that it made.

    meft1-exact/random:bert-tiny/…  peak_allocated_bytes
      2026-11-20  3f2a91bc   19,324,856 bytes (18.4 MiB)
      2026-11-27  931d041a   19,511,224 bytes (18.6 MiB)  +186,368 bytes, +0.96 %

The commit is that of the project that is measured, as `commits` defines it; `+` marks
uncommitted changes. Of each cell, records are ordered by the time at which they
started; those of one code and project are one line, with their last value. A line for
each step is shown, and where a cell did not end well, how it ended. A change is
relative to the last value under the same `conditions`: of the same metric and rows, or
on the same machine. Where they are others than in the line above, the line names them.
"""

import fnmatch
import math
from collections.abc import Sequence

from meft_reports.columns import MEASURED
from meft_reports.columns.column import Column
from meft_reports.commits import LENGTH, measured, of_project
from meft_reports.compared import Number, compared_number, exact
from meft_reports.conditions import Facts, facts_of
from meft_reports.errors import ReportError
from meft_reports.format import format_fact, format_value
from meft_reports.latest import code_of, in_order
from meft_reports.pairing import identity, refuse_several
from meft_reports.text import plural, printable
from meft_reports.valid_records import READERS, Record

NOISE_SHARE = 0.05
"""Smallest change of a measured time that is a step, as a share."""


def history(
    records: Sequence[Record],
    column: Column,
    *,
    only: str = "*",
    ignored: Sequence[str] = (),
) -> str:
    """Return the history of a column, a paragraph for each cell in which it changed.

    Args:
        records: all records of the runs, several of a cell.
        column: the column.
        only: pattern of the ids of cells.
        ignored: fields in which the records of a paragraph may differ; each line has
            their values, and the paragraph the name of its last cell.

    Raises:
        ReportError: there is no record, no cell has such an id, or none has the column;
            or without the fields, several cells that ran with one code are one.
    """
    if not records:
        raise ReportError("the files hold no record; run a sweep into them first")
    chosen = [r for r in records if fnmatch.fnmatchcase(r["cell_id"], only)]
    if not chosen:
        raise ReportError(
            f"--only {printable(only)}: no cell of the records has such an id"
        )
    if all(
        compared_number(column, r["measurement"].get(column.name)) is None
        for r in chosen
    ):
        raise ReportError(f"no record has {column.name}{_others(chosen, column)}")
    by_cell: dict[str, list[Record]] = {}
    for record in in_order(chosen):
        by_cell.setdefault(identity(record, ignored), []).append(record)
    paragraphs = []
    num_same = 0
    for its in sorted(by_cell.values(), key=_name):
        lines = _steps(its, column, ignored)
        if len(lines) > 1:
            head = f"{printable(_name(its))}  {column.name}"
            paragraphs.append("\n".join([head, *lines]))
        else:
            num_same += 1
    words = f"{plural(num_same, 'cell')} without a step"
    return "\n\n".join([*paragraphs, words])


def _others(records: Sequence[Record], column: Column) -> str:
    """Return which predicted times there are instead of a measured one, in words."""
    if not column.is_measured_time:
        return ""
    names = [
        one.name
        for one in MEASURED
        if one.is_predicted
        and any(r["measurement"].get(one.name) is not None for r in records)
    ]
    return f", but some have the predicted {' and '.join(names)}" if names else ""


def _name(records: Sequence[Record]) -> str:
    return str(records[-1]["cell_id"])


def _steps(
    records: Sequence[Record], column: Column, ignored: Sequence[str]
) -> list[str]:
    """Return a line for the first value, and for each that is another than before."""
    lines: list[str] = []
    last: dict[str, Number] = {}  # by the conditions of a value
    above: Facts | None = None
    ended = ""
    by_code: dict[tuple[str | None, ...], list[Record]] = {}
    for record in records:
        place = (code_of(record), of_project(record), record["environment"]["machine"])
        # A code that is run again counts at its last place.
        by_code[place] = [*by_code.pop(place, []), record]
    for of_code in by_code.values():
        refuse_several(of_code, ignored, f"that ran with code {code_of(of_code[0]):.8}")
        record = of_code[-1]
        value = compared_number(column, record["measurement"].get(column.name))
        if record["status"] != "ok":
            if ended != record["status"]:
                lines.append(f"{_head(record)}{record['status']}")
            ended = record["status"]
            continue
        if value is None or not math.isfinite(value):
            continue
        facts = facts_of(record, column)
        before, change = last.get(str(facts)), ""
        if before is not None:
            difference = exact(value) - exact(before)
            share = float(difference / exact(abs(before))) if before else math.inf
            least = NOISE_SHARE if column.is_measured_time else 0
            if (not difference or abs(share) < least) and not ended:
                continue
            sign = "+" if difference > 0 else "-"
            size = format_value(abs(difference), column.unit)
            change = f"  {sign}{size}, {100 * share:+.2f} %"
        others = _other_facts(above, facts)
        last[str(facts)], above, ended = value, facts, ""
        lines.append(
            f"{_head(record)}{format_value(value, column.unit)}{change}"
            f"{others}{_fields(record, ignored)}"
        )
    return lines


def _other_facts(above: Facts | None, facts: Facts) -> str:
    """Return the conditions of a value that differ from those of the line above."""
    if above is None:
        return ""
    return "".join(
        f"  {name}={printable(text)}"
        for name, text in facts.items()
        if text != above[name]
    )


def _head(record: Record) -> str:
    commit, is_dirty = measured(record)
    shown = printable(commit or code_of(record))[:LENGTH] + "+" * is_dirty
    return f"  {record['started_at'][:10]}  {shown:<{LENGTH + 1}}  "


def _fields(record: Record, names: Sequence[str]) -> str:
    """Return the values of some fields of a cell."""
    return "".join(
        f"  {name}={printable(format_fact(READERS[name](record)))}" for name in names
    )
