"""What tests took before: a file of JSON for each file of tests, in a folder beside it.

    {"test_step": {"torch 2.13.0, cpu": [{"saved_bytes": ..., ...}]}}

Each entry is a list, as a test may measure several times. A part of it may have the
reason of its last change, `baseline_reason`, as the records of `meft-report baseline`
have. Keys are sorted, so that a version control system shows what changed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

Entry = list[dict[str, Any]]
"""What one test took."""
NUMBERS = ("saved_bytes", "peak_allocated_bytes")
REASON = "baseline_reason"
"""Field of a part of an entry: why its numbers are as they are."""
Baseline = dict[str, dict[str, Entry]]
"""Entries by test and by what they depend on."""


def path_of(tests: Path, folder: str) -> Path:
    """Return the file with the baselines of a file of tests."""
    return tests.parent / folder / f"{tests.stem}.json"


def read(path: Path) -> Baseline:
    """Return the baselines in a file; none if there is no file.

    Raises:
        UsageError: the file is no file of baselines.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_without_duplicates)
        sound = isinstance(found, dict) and all(
            isinstance(entries, dict) and all(map(_is_entry, entries.values()))
            for entries in found.values()
        )
    except (OSError, ValueError, RecursionError) as error:
        raise pytest.UsageError(f"{path}: {error}; restore the file") from error
    if not sound:
        raise pytest.UsageError(
            f"{path} is no file of baselines; restore it, or delete it and run with "
            "--meft-update=create"
        )
    return dict(found)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; both sides of a merge may have left a test twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and all(
        isinstance(one, dict)
        and all(type(one.get(name, 0)) in (int, type(None)) for name in NUMBERS)
        and isinstance(one.get(REASON, ""), str)
        for one in entry
    )


def with_reasons(before: Entry | None, after: Entry, reason: str) -> Entry:
    """Return what a test took, with the reason of each part's last change.

    Args:
        before: the entry of the baseline; None if it has none.
        after: what the test took.
        reason: that of parts that are new or have changed; "" for none. Other parts
            keep the one that they have.
    """
    old = [*(before or [])]
    old += [{}] * (len(after) - len(old))
    return [
        was
        if {name: value for name, value in was.items() if name != REASON} == now
        else now | ({REASON: reason} if reason else {})
        for was, now in zip(old, after, strict=False)
    ]


def _text(value: Any, indent: int = 0) -> str:
    """Return JSON with a line for each row of a breakdown, and sorted keys."""
    inside, outside = "\n" + " " * (indent + 1), "\n" + " " * indent
    if isinstance(value, dict) and value:
        parts = [
            f"{json.dumps(name)}: {_text(value[name], indent + 1)}"
            for name in sorted(value)
        ]
        return f"{{{inside}{f',{inside}'.join(parts)}{outside}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        parts = [
            _text(one, indent + 1) if isinstance(one, dict) else json.dumps(one)
            for one in value
        ]
        return f"[{inside}{f',{inside}'.join(parts)}{outside}]"
    return json.dumps(value, allow_nan=False)


def write(path: Path, baseline: Baseline) -> None:
    """Write baselines, atomically; a file without any is removed."""
    kept = {test: entries for test, entries in baseline.items() if entries}
    if not kept:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(f"{_text(kept)}\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
