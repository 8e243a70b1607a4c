"""The baseline: the ok records of a run, kept to compare later runs with.

A file of JSON lines, one record each, sorted by `cell_id`, so that a version control
system shows a change of one cell as a change of one line. The records are kept whole:
where a number came from is part of it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meft_reports.columns import MEASURED
from meft_reports.errors import ReportError
from meft_reports.files import write_atomically
from meft_reports.format import format_value
from meft_reports.frame import read_records


def update_baseline(runs: Sequence[Path], path: Path) -> list[str]:
    """Make `path` hold the ok cells of `runs` and nothing else.

    Returns:
        Lines that say what changed: cells added, cells removed, numbers changed.

    Raises:
        RecordError: a file cannot be read.
        ReportError: no cell of `runs` is ok; `path` is left as it was.
    """
    records = {record["cell_id"]: record for record in read_records(runs)}
    kept = {name: r for name, r in records.items() if r["status"] == "ok"}
    if not kept:
        raise ReportError(f"no ok cell in {', '.join(map(str, runs))}: nothing to keep")
    before = {}
    if path.exists() and path.stat().st_size:
        before = {record["cell_id"]: record for record in read_records([path])}
    changes = _changes(before, kept, records)
    lines = [json.dumps(kept[name], sort_keys=True) + "\n" for name in sorted(kept)]
    write_atomically(path, "".join(lines).encode())
    return changes


def _changes(
    before: dict[str, Any], kept: dict[str, Any], records: dict[str, Any]
) -> list[str]:
    lines = []
    for name in sorted(before.keys() | kept.keys()):
        if name not in before:
            lines.append(f"added    {name}")
        elif name not in kept:
            ended = records[name]["status"] if name in records else "not in the runs"
            lines.append(f"removed  {name} ({ended})")
        else:
            differing = _differing(before[name], kept[name])
            lines += [f"changed  {name} {text}" for text in differing]
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
        old = before["measurement"].get(column.name)
        new = after["measurement"].get(column.name)
        if old != new:
            was, now = (format_value(value, column.unit) for value in (old, new))
            texts.append(f"{column.name}: {was} → {now}")
    return texts
