"""The baseline: the ok records of a run, kept to compare later runs with.

It is a file of JSON lines, one record each, sorted by `cell_id`, so that a version
control system shows a change of one cell as a change of one line. The records are kept
completely, including the origin of their numbers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_reports.breakdown import Breakdown
from meft_reports.columns import MEASURED
from meft_reports.compared import compared_number, format_number
from meft_reports.errors import ReportError
from meft_reports.files import write_atomically
from meft_reports.records import read_baseline, read_records
from meft_reports.text import printable

MAX_NAMES = 5
"""Number of cells that an error names."""

REASON = "baseline_reason"
"""Field of a record of a baseline: why its numbers are as they are."""
Records = Mapping[str, dict[str, Any]]
"""Records by `cell_id`."""


def update_baseline(
    runs: Sequence[Path], path: Path, *, may_remove: bool, reason: str = ""
) -> list[str]:
    """Write the ok cells of `runs`, and only these, to `path`.

    Args:
        runs: files of records.
        path: the baseline; it is created if it does not exist.
        may_remove: whether cells of `path` that are not ok in `runs`, or not in them,
            may be removed.
        reason: why numbers change, which cells that are new or changed keep as
            `baseline_reason`; other cells keep the reason that they have.

    Returns:
        Lines that describe the changes: cells added, cells removed, numbers changed,
        and the cells of `runs` that are not kept.

    Raises:
        RecordError: a file cannot be read.
        ReportError: no cell of `runs` is ok, or a cell would be removed and may not be;
            `path` is not changed.
    """
    found, _ = read_records(runs)
    records = {record["cell_id"]: record for record in found}
    kept = {name: r for name, r in records.items() if r["status"] == "ok"}
    if not kept:
        raise ReportError(f"no ok cell in {', '.join(map(str, runs))}: nothing to keep")
    before = {}
    if path.is_file() and path.read_bytes().strip():
        before = {record["cell_id"]: record for record in read_baseline(path)}
    removed = sorted(before.keys() - kept.keys())
    if removed and not may_remove:
        raise ReportError(_refusal(path, removed, records))
    kept = {
        name: record | _reason(before.get(name), record, reason)
        for name, record in kept.items()
    }
    changes = _changes(before, kept, records)
    lines = [
        json.dumps(kept[name], sort_keys=True, default=Breakdown.to_json) + "\n"
        for name in sorted(kept)
    ]
    write_atomically(path, "".join(lines).encode())
    return changes


def _reason(
    before: dict[str, Any] | None, record: dict[str, Any], reason: str
) -> dict[str, str]:
    """Return the reason that a cell of the baseline keeps; empty for none."""
    if before is None or _differing(before, record):
        return {REASON: reason} if reason else {}
    return {REASON: before[REASON]} if REASON in before else {}


def _refusal(path: Path, removed: Sequence[str], records: Records) -> str:
    names = [
        f"{printable(name)} ({_ending(name, records)})" for name in removed[:MAX_NAMES]
    ]
    more = len(removed) - MAX_NAMES
    names += [f"{more} more"] if more > 0 else []
    return (
        f"{path} would lose {len(removed)} of its cells: {', '.join(names)}; run these "
        "cells until they end well, or pass --remove to drop them"
    )


def _ending(name: str, records: Records) -> str:
    return str(records[name]["status"]) if name in records else "not in the runs"


def _changes(before: Records, kept: Records, records: Records) -> list[str]:
    lines = []
    for name in sorted(before.keys() | records.keys()):
        shown = printable(name)
        if name in before and name not in kept:
            lines.append(f"removed  {shown} ({_ending(name, records)})")
        elif name not in kept:
            lines.append(f"not kept {shown} ({_ending(name, records)})")
        elif name not in before:
            lines.append(f"added    {shown}")
        else:
            differing = _differing(before[name], kept[name])
            lines += [f"changed  {shown} {text}" for text in differing]
    num_changed = sum(
        before[name] != kept[name] for name in before.keys() & kept.keys()
    )
    added, removed = kept.keys() - before.keys(), before.keys() - kept.keys()
    lines.append(
        f"{len(kept)} cells: {len(added)} added, {len(removed)} removed, "
        f"{num_changed} with another record"
    )
    return lines


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    texts = []
    for column in MEASURED:
        was, now = (
            format_number(
                column, compared_number(column, record["measurement"].get(column.name))
            )
            for record in (before, after)
        )
        if was != now:
            texts.append(f"{column.name}: {was} → {now}")
    return texts
