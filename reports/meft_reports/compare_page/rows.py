"""A comparison as rows of text, each number with its exact value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meft_reports.columns.column import Column
from meft_reports.compare import Cause, Changed, Comparison
from meft_reports.format import format_bytes, format_seconds, format_value
from meft_reports.text import plural, printable

MOST = 1e300
"""By which a ratio that is infinite is sorted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A number in a cell of the table."""

    text: str
    exact: str
    """In smaller letters below: the exact value, or an interval; else empty."""
    order: float
    """By which the table sorts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedRow:
    """A number of a cell in two runs."""

    cell_id: str
    quantity: str
    before: Shown
    after: Shown
    ratio: Shown
    difference: Shown
    doubt: str
    grew: tuple[str, ...]


def row_of(changed: Changed) -> ChangedRow:
    """Return the row of a difference."""
    column, ratio = changed.column, changed.ratio
    return ChangedRow(
        cell_id=printable(changed.cell_id),
        quantity=column.short_name.replace("_", " "),
        before=_number(changed.before, column),
        after=_number(changed.after, column),
        ratio=Shown(
            text="from 0" if math.isinf(ratio) else f"{ratio:.4f}×",  # noqa: RUF001
            exact=_interval(changed),
            order=min(ratio, MOST),
        ),
        difference=_number(changed.after - changed.before, column, is_signed=True),
        doubt=printable(changed.doubt),
        grew=changed.grew,
    )


def _interval(changed: Changed) -> str:
    if changed.interval is None:
        return ""
    return "95 %: {:.4f} to {:.4f}".format(*changed.interval)


def _number(value: float, column: Column, *, is_signed: bool = False) -> Shown:
    size = abs(value) if is_signed else value
    sign = ("+" if value > 0 else "−") if is_signed else ""  # noqa: RUF001
    if column.unit == "bytes":
        exact = f"{sign}{int(size):,} bytes"
        return Shown(text=f"{sign}{format_bytes(size)}", exact=exact, order=value)
    if column.unit == "seconds":
        return Shown(text=f"{sign}{format_seconds(size)}", exact="", order=value)
    text = f"{sign}{format_value(size, column.unit)}"
    return Shown(text=text, exact="", order=value)


def cause_in_words(cause: Cause, num_pairs: int) -> str:
    """Return how many cells a cause concerns."""
    if cause.num_cells == num_pairs:
        return "all cells" if num_pairs > 1 else "the cell"
    return f"{cause.num_cells:,} of {num_pairs:,} cells"


def summary_of(comparison: Comparison) -> list[str]:
    """Return the comparison in a few sentences."""
    its = comparison
    sentences = []
    for some, word in ((its.worse, "worse"), (its.better, "better")):
        cells = plural(len({one.cell_id for one in some}), "cell")
        doubted = sum(bool(one.doubt) for one in some)
        noise = f", of which {doubted:,} may be noise" * bool(doubted)
        counted = plural(len(some), "number")
        sentences.append(f"{counted} of {cells} {_is(some)} {word}{noise}.")
    sentences.append(
        f"No number differs in {len(its.same):,} of the "
        f"{plural(its.num_pairs, 'cell')} of both runs."
    )
    if its.endings:
        ended = plural(len({ending.cell_id for ending in its.endings}), "cell")
        sentences.append(f"{ended} ended or measured in another way than before.")
    return sentences


def _is(some: Sequence[Changed]) -> str:
    return "is" if len(some) == 1 else "are"
