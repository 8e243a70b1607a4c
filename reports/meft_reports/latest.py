"""Select the record of a cell that counts if the cell was run more than once.

Records are ordered by their start time; those of the same second by their position, in
the order of the files and of the lines of a file.

    cell             a record's `cell_id`; of an answer of a search, also its options,
                     as searches with other options may have the same answer
    newest code      the `code_sha256` of the last record of all
    code of a cell   the newest code if the cell ran with it, else the code of the
                     cell's last record
    what counts      among the cell's records with that code, the last one on each
                     machine: of those the last that failed, or the last if none failed

A failure therefore counts until the cell ends well with the same code on the same
machine, and no ok record of older code replaces it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from meft_reports.searches import SEARCHES, options_in_words, search_of

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


def counting(ordered: Sequence[Record]) -> list[Record]:
    """Return the record that counts of every cell, sorted by `cell_id`.

    Answers of several searches that are the same cell have the options of their search
    at the end of their `cell_id`.

    Args:
        ordered: all records of a run, `in_order`.
    """
    by_cell: dict[tuple[str, str], list[Record]] = {}
    for record in ordered:
        key = record["cell_id"], search_of(record["sweep"], record.get("sweep_caveats"))
        by_cell.setdefault(key, []).append(record)
    newest = newest_code(ordered)
    found = [_counting(by_cell[key], newest) for key in sorted(by_cell)]
    names = Counter(record["cell_id"] for record in found)
    options = options_in_words(
        record["sweep_caveats"] or ""
        for record in found
        if record["sweep"] in SEARCHES and names[record["cell_id"]] > 1
    )
    return [
        record
        if names[record["cell_id"]] == 1 or record["sweep"] not in SEARCHES
        else record | {"cell_id": _named(record, options)}
        for record in found
    ]


def _named(record: Record, options: Mapping[str, str]) -> str:
    words = options[record["sweep_caveats"] or ""]
    return "/".join(filter(None, (record["cell_id"], record["sweep"], words)))


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
