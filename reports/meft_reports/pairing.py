"""Which cells of two runs are compared: those that are equal, but for fields left out.

Two cells are the same cell if they have the same `cell_id`. If fields are left out,
they are if all their other fields agree: `--ignore attention` pairs a cell with `sdpa`
with the one with `eager` of the other run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from meft_reports.columns import CELL_FIELDS
from meft_reports.errors import ReportError, UnknownName
from meft_reports.text import printable
from meft_reports.valid_records import READERS, Record

MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedCell:
    """One cell in two runs."""

    cell_id: str
    """That of the first run."""
    before: Record
    after: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """The cells of two runs."""

    pairs: tuple[PairedCell, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]


def find_fields(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of fields of a cell, each once.

    Args:
        names: what the user gave.

    Raises:
        UnknownName: a cell has no such field.
    """
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in CELL_FIELDS:
            raise UnknownName("field", name, CELL_FIELDS)
    return found


def pair(
    before: Sequence[Record], after: Sequence[Record], ignored: Sequence[str] = ()
) -> Pairing:
    """Return the cells that are in both runs, and those of one run only.

    Args:
        before: the records that count of the first run.
        after: those of the second one.
        ignored: names of `find_fields`, in which two cells of a pair may differ.

    Raises:
        ReportError: several cells of a run would be in one pair.
    """
    old, new = (_by_identity(records, ignored) for records in (before, after))
    both = [name for name in old if name in new]
    for run, cells in (("first", old), ("second", new)):
        for name in both:
            refuse_several(cells[name], ignored, f"in the {run} run")
    return Pairing(
        pairs=tuple(
            PairedCell(
                cell_id=old[name][0]["cell_id"],
                before=old[name][0],
                after=new[name][0],
            )
            for name in both
        ),
        only_before=_names(old, both),
        only_after=_names(new, both),
    )


def identity(record: Record, ignored: Sequence[str]) -> str:
    """Return a text that is equal for records of the same cell.

    Args:
        record: a valid record.
        ignored: names of fields that are left out.
    """
    if not ignored:
        return str(record["cell_id"])
    # Fields that older records lack have their default, and unknown ones count too.
    fields: dict[str, Any] = dict(record["cell"])
    fields |= {name: READERS[name](record) for name in CELL_FIELDS}
    kept = {name: value for name, value in fields.items() if name not in ignored}
    return json.dumps(kept, sort_keys=True)


def refuse_several(
    records: Sequence[Record], ignored: Sequence[str], where: str
) -> None:
    """Raise if records of one identity are of several cells.

    Args:
        records: records of one identity.
        ignored: names of fields that are left out.
        where: what they have in common, for the message.

    Raises:
        ReportError: they are; it names the cells.
    """
    names = sorted({printable(record["cell_id"]) for record in records})
    if len(names) > 1:
        fields = " and ".join(f"--ignore {name}" for name in ignored)
        shown = ", ".join(names[:MOST_NAMED])
        more = f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED)
        raise ReportError(
            f"{fields} makes one cell of {len(names)} {where}: {shown}{more}; ignore "
            "fewer fields, or give runs in which one of these cells ran"
        )


def _by_identity(
    records: Sequence[Record], ignored: Sequence[str]
) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(identity(record, ignored), []).append(record)
    return found


def _names(cells: dict[str, list[Record]], both: Sequence[str]) -> tuple[str, ...]:
    kept = set(both)
    return tuple(
        record["cell_id"]
        for name, records in cells.items()
        if name not in kept
        for record in records
    )
