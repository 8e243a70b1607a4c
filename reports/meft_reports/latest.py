"""Select the record of a cell that counts if the cell was run more than once.

Records are ordered by their start time; those of the same second by their position, in
the order of the files and of the lines of a file.

    newest code      the `code_sha256` of the last record of all
    code of a cell   the newest code if the cell ran with it, else the code of the
                     cell's last record
    what counts      among the cell's records with that code, the last one on each
                     machine: of those the last that failed, or the last if none failed

A failure therefore counts until the cell ends well with the same code on the same
machine, and no ok record of older code replaces it.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

FAILED = ("oom", "timeout", "killed", "error")

Record = dict[str, Any]


def in_order(records: Iterable[Record]) -> list[Record]:
    """Return records of any cells in the order in which they started.

    Args:
        records: records in the order of files and lines, each with a `started_at` in
            ISO 8601 that includes its offset from UTC.
    """
    return sorted(records, key=lambda r: datetime.fromisoformat(r["started_at"]))


def newest_code(ordered: Sequence[Record]) -> str:
    """Return the digest of the code of the last of some records `in_order`."""
    return code_of(ordered[-1])


def counting(ordered: Sequence[Record]) -> dict[str, Record]:
    """Return the record that counts of every cell, by `cell_id`.

    Args:
        ordered: all records of a run, `in_order`.
    """
    by_cell: dict[str, list[Record]] = {}
    for record in ordered:
        by_cell.setdefault(record["cell_id"], []).append(record)
    return {
        cell_id: _counting(records, newest_code(ordered))
        for cell_id, records in by_cell.items()
    }


def _counting(records: Sequence[Record], newest: str) -> Record:
    ran_with_newest = any(code_of(record) == newest for record in records)
    code = newest if ran_with_newest else newest_code(records)
    last = {
        record["environment"]["machine"]: place
        for place, record in enumerate(records)
        if code_of(record) == code
    }
    candidates = [records[place] for place in sorted(last.values())]
    failed = [record for record in candidates if record["status"] in FAILED]
    return (failed or candidates)[-1]


def code_of(record: Record) -> str:
    """Return the digest of the code that a record ran with."""
    return str(record["environment"]["code_sha256"])
