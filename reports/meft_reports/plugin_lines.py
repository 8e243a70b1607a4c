"""What tests took, as the plugin of pytest writes it (`--meft-records`), for `history`.

A line is one test, with a part for each time that it measured:

    {"path": PATH, "name": "test_step", "key": "torch 2.13.0, cpu",
     "started_at": "2026-11-27T10:11:12+00:00",
     "entry": [{"saved_bytes": ..., "peak_allocated_bytes": ..., ...}],
     "environment": {"project_commit": ..., "project_dirty": ...}, ...}

It is not a record of a cell, so no other command reads it.
"""

import json
from pathlib import Path
from typing import Any

from meft_reports.errors import RecordError
from meft_reports.files import read_whole
from meft_reports.valid_records import Record, check_time, quoted

_FIELDS = {"path": str, "name": str, "key": str, "started_at": str, "entry": list}


def is_of_tests(path: Path) -> bool:
    """Return whether the first line of a file is of a test.

    Args:
        path: the file.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        line = json.loads(read_whole(path).partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"name", "entry"} <= line.keys()


def read(path: Path) -> list[Record]:
    """Return the fields of a record that a history needs, for each part of a test.

    Args:
        path: a file of `--meft-records`.

    Raises:
        RecordError: a line is not of a test; names the file and the line.
    """
    found = []
    for number, text in enumerate(read_whole(path).splitlines(), start=1):
        if text.strip():
            found += _parts(text, f"{path}:{number}")
    return found


def _parts(text: bytes, where: str) -> list[Record]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON: {error}") from error
    if not isinstance(line, dict):
        raise RecordError(f"{where}: expected a JSON object, got {quoted(line)}")
    for name, kind in _FIELDS.items():
        if not isinstance(line.get(name), kind):
            raise RecordError(
                f"{where}: `{name}` of what a test took is missing or no "
                f"{kind.__name__}; write the file again with this plugin"
            )
    check_time(line["started_at"], where)
    of_project = line.get("environment")
    its = of_project if isinstance(of_project, dict) else {}
    commit = its.get("project_commit")
    if commit is not None and not isinstance(commit, str):
        raise RecordError(
            f"{where}: `environment.project_commit` should be a text, got "
            f"{quoted(commit)}"
        )
    name = f"{line['path']}::{line['name']} ({line['key']})"
    several = len(line["entry"]) > 1
    return [
        {
            "cell_id": f"{name}, part {index}" if several else name,
            "status": "ok",
            "started_at": line["started_at"],
            "cell": {},
            "measurement": _numbers(part, where),
            "environment": {
                "code_sha256": "",
                "machine": line["key"],
                "project_commit": commit,
                "project_dirty": its.get("project_dirty"),
            },
        }
        for index, part in enumerate(line["entry"], start=1)
    ]


def _numbers(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise RecordError(f"{where}: a part of `entry` is no JSON object")
    numbers = {n: v for n, v in part.items() if n.endswith("_bytes")}
    for name, value in numbers.items():
        if value is not None and (type(value) is not int or value < 0):
            raise RecordError(
                f"{where}: `{name}` should be a number of bytes, got {quoted(value)}"
            )
    return numbers
