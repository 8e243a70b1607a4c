"""The breakdown of a peak of memory in a record, and what grew between two of them.

A record's `memory_breakdown` has the bytes that were alive at the peak, summed by kind,
phase, module, operator, dtype and shape (docs/numbers.md). Its rows and `other_bytes`
add up to `peak_bytes`.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from meft_reports.errors import RecordError
from meft_reports.format import format_bytes
from meft_reports.text import plural, printable

MOST_BYTES = 2**60
LENGTH = 120
"""Number of characters of a name that are shown."""


class PeakRow(NamedTuple):
    """Storages alive at a peak that agree in all but their number and bytes."""

    kind: str
    phase: str
    module: str
    """Numbers in it are `*`."""
    operator: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    num_storages: int
    first_op: int
    """Operator of the step that made the first of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """What a peak consists of: the fields of `memory_breakdown` in a record."""

    peak_bytes: int
    at_op: int
    num_ops: int
    phase: str
    rows: tuple[PeakRow, ...]
    other_bytes: int
    saved_bytes: int
    saved_rows: tuple[PeakRow, ...]
    """What one forward kept for its backward, which need not be at the peak."""
    saved_other_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as a record keeps it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Shared = dict[Any, Any]
"""Breakdowns, rows and names that were read before, each with itself as its key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Rows of two breakdowns that describe the same memory, and their difference."""

    num_bytes: int
    num_storages: int
    before: PeakRow | None
    after: PeakRow | None

    def __str__(self) -> str:
        """Return it in a line."""
        row = self.after or self.before
        assert row is not None
        words = [
            _signed(self.num_bytes),
            f"{self.num_storages:+d}x" if self.num_storages else "",
        ]
        was = self.before or row
        words += [_both(was.kind, row.kind), f"in {row.phase}" if row.phase else ""]
        words += [row.module or "(no module)", _both(was.operator, row.operator)]
        words.append(_both(_shape(was), _shape(row)))
        return "  ".join(printable(word, LENGTH) for word in words if word)


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What grew between two peaks."""

    moved: str
    """In words, if the peak is in another phase than before; else empty."""
    changes: tuple[Change, ...]
    """Largest first."""
    unexplained_bytes: int
    """The part of the difference of the peaks that no change explains."""

    def lines(self, most: int) -> list[str]:
        """Return the largest changes, the first one of the step, and what is left."""
        found = [self.moved] if self.moved else []
        found += [str(change) for change in self.changes[:most]]
        left_out = self.changes[most:]
        if left_out:
            size = _signed(sum(change.num_bytes for change in left_out))
            found.append(f"{size}  {plural(len(left_out), 'smaller change')}")
        if first := self.first():
            found.append(f"first: {first}")
        if self.unexplained_bytes:
            size = _signed(self.unexplained_bytes)
            found.append(f"in smaller parts that records do not keep: {size}")
        return found

    def first(self) -> str:
        """Return the operator of the first allocation that differs, in words."""
        grown = [change for change in self.changes if change.num_bytes > 0]
        rows = [change.after for change in grown if change.after is not None]
        made = [row for row in rows if row.operator]
        if not made:
            return ""
        row = min(made, key=lambda row: row.first_op)
        place = row.module or "(no module)"
        if not row.first_op:
            return printable(f"{row.operator} of {place}, before this step", LENGTH)
        text = f"operator {row.first_op:,}, {row.operator} of {place} in {row.phase}"
        return printable(text, LENGTH)


def read(value: Any, where: str, shared: Shared | None = None) -> Breakdown:
    """Return the breakdown in a value of JSON.

    Args:
        value: the value.
        where: file and line, for the message.
        shared: what was read before. Equal rows and breakdowns become one object: those
            of two seeds are equal, and a record has hundreds of rows.

    Raises:
        RecordError: it is none.
    """
    shared = {} if shared is None else shared
    try:
        is_sound = value.keys() == _FIELDS and _is_sound(value)
    except (TypeError, ValueError, AttributeError):  # of some other type
        is_sound = False
    if not is_sound:
        raise RecordError(
            f"{where}: `memory_breakdown` should have the fields "
            f"{', '.join(field.name for field in fields(Breakdown))}, counts of at "
            "least 0, and rows that add up, with `other_bytes`, to `peak_bytes`, as "
            "docs/numbers.md defines it"
        )
    rows = {name: _rows(value[name], shared) for name in ("rows", "saved_rows")}
    found = Breakdown(**{**value, **rows})
    kept: Breakdown = shared.setdefault(found, found)
    return kept


_FIELDS = {field.name for field in fields(Breakdown)}


def _is_sound(value: dict[str, Any]) -> bool:
    counts = [value[name] for name in _FIELDS - {"phase", "rows", "saved_rows"}]
    sums = [("peak_bytes", "rows", "other_bytes")]
    sums.append(("saved_bytes", "saved_rows", "saved_other_bytes"))
    return (
        type(value["phase"]) is str
        and _are_counts(counts)
        and all(
            _are_rows(value[rows])
            and sum(row[6] for row in value[rows]) + value[other] == value[total]
            for total, rows, other in sums
        )
    )


def _are_rows(rows: Any) -> bool:
    """Return whether these are rows; a column at a time, which is faster."""
    if not {list}.issuperset(map(type, (rows, *rows))):
        return False
    if not {len(PeakRow._fields)}.issuperset(map(len, rows)):
        return False
    columns = [*zip(*rows, strict=True)]
    texts, shapes, counts = (
        [*itertools.chain(*columns[part])]
        for part in (slice(5), slice(5, 6), slice(6, None))
    )
    return (
        {str}.issuperset(map(type, texts))
        and {list}.issuperset(map(type, shapes))
        and _are_counts([*counts, *itertools.chain(*shapes)])
    )


def _are_counts(values: list[Any]) -> bool:
    is_int = {int}.issuperset(map(type, values))
    return (
        is_int and 0 <= min(values, default=0) <= max(values, default=0) <= MOST_BYTES
    )


def _rows(value: list[list[Any]], shared: Shared) -> tuple[PeakRow, ...]:
    found = []
    for entries in value:
        row = (*entries[:5], tuple(entries[5]), *entries[6:])
        if row not in shared:
            names, shape = (shared.setdefault(it, it) for it in (row[:5], row[5]))
            made = PeakRow._make((*names, shape, *row[6:]))
            shared[made] = made
        found.append(shared[row])
    return tuple(found)


def what_grew(
    before: Breakdown, after: Breakdown, difference: int, *, is_saved: bool = False
) -> Growth:
    """Return what explains the difference of two peaks.

    Rows that agree in all names are compared first, then those of an operator with
    another shape, and then what is left, by kind, phase and module: operators have
    other names in other versions of torch. Memory that is as large as before and of
    another kind is no difference.

    Args:
        before: the breakdown of the baseline.
        after: that of the run.
        difference: the difference to explain, in bytes.
        is_saved: whether what was saved for backward is compared, and not the peaks.
    """
    old, new = (
        [*(its.saved_rows if is_saved else its.rows)] for its in (before, after)
    )
    changes: list[Change] = []
    for key in (_names, _operator, _place):
        sums = [_summed(rows, key) for rows in (old, new)]
        both = sums[0].keys() & sums[1].keys()
        changes += [_change(sums[0][name], sums[1][name]) for name in both]
        old, new = (
            [row for row in rows if key(row) not in both] for rows in (old, new)
        )
    moved = Counter(map(_size, old)) & Counter(map(_size, new))
    old, new = (_without(rows, moved) for rows in (old, new))
    changes += [_change([row], []) for row in old]
    changes += [_change([], [row]) for row in new]
    changes = [change for change in changes if change.num_bytes]
    changes.sort(key=lambda change: (-abs(change.num_bytes), str(change)))
    phases = f"the peak was in {before.phase}, and is in {after.phase} now"
    return Growth(
        moved=phases * (before.phase != after.phase and not is_saved),
        changes=tuple(changes),
        unexplained_bytes=difference - sum(change.num_bytes for change in changes),
    )


def _names(row: PeakRow) -> tuple[Any, ...]:
    return row[:6]


def _operator(row: PeakRow) -> tuple[Any, ...]:
    return *row[:5], len(row.shape)


def _place(row: PeakRow) -> tuple[Any, ...]:
    return row[:3]


def _size(row: PeakRow) -> tuple[Any, ...]:
    return row.module, row.dtype, row.shape, row.num_bytes


def _without(rows: Iterable[PeakRow], sizes: Counter[tuple[Any, ...]]) -> list[PeakRow]:
    """Return rows without as many of each size as there are to leave out."""
    left = Counter(sizes)
    found = []
    for row in rows:
        if left[_size(row)]:
            left[_size(row)] -= 1
        else:
            found.append(row)
    return found


def _summed(
    rows: Iterable[PeakRow], key: Callable[[PeakRow], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[PeakRow]]:
    found: dict[tuple[Any, ...], list[PeakRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _change(before: Sequence[PeakRow], after: Sequence[PeakRow]) -> Change:
    """Return the difference of the sums of two lists of rows."""

    def largest(rows: Sequence[PeakRow]) -> PeakRow | None:
        return max(rows, key=lambda row: (row.num_bytes, row), default=None)

    return Change(
        num_bytes=sum(r.num_bytes for r in after) - sum(r.num_bytes for r in before),
        num_storages=sum(r.num_storages for r in after)
        - sum(r.num_storages for r in before),
        before=largest(before),
        after=largest(after),
    )


def _signed(num_bytes: int) -> str:
    sign = "-" if num_bytes < 0 else "+"
    return sign + format_bytes(abs(num_bytes))


def _both(before: str, after: str) -> str:
    return after if before == after else f"{before or '-'} → {after or '-'}"


def _shape(row: PeakRow) -> str:
    return f"{row.dtype} {list(row.shape)}" if row.dtype else ""
