"""Read files of JSON lines and return one valid record per cell.

The form of a record, and the range of each number, are defined by
`meft_reports.columns`; this module does not depend on the harness. `latest` selects the
record of a cell that counts.
"""

import contextlib
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from meft_reports.columns import (
    BY_NAME,
    COLUMNS,
    LEAST_SCORES,
    SCHEMA_VERSION,
    SCORE_NAMES,
)
from meft_reports.columns.column import Column
from meft_reports.derived import DERIVED, derive
from meft_reports.errors import RecordError, UnknownName
from meft_reports.latest import FAILED, code_of, counting, in_order, newest_code
from meft_reports.text import SHORT_LENGTH, plural, printable

STATUSES = ("ok", "oom", "timeout", "killed", "error", "skipped")
SECTIONS = ("cell", "measurement", "environment")
GREATEST = {"bytes": 2.0**60, "seconds": 1e12, "count": 2.0**53}
"""Maximum by unit, larger than any measurement, so that sums stay finite."""
NOTE_LENGTH = 10_000
"""Maximum number of characters of a note."""
SLACK = 1e-6
"""Amount by which a share may exceed its bound, due to float32 rounding."""

Record = dict[str, Any]


def read_records(paths: Sequence[Path]) -> tuple[list[Record], str]:
    """Return the records that count, sorted by `cell_id`, and the newest code.

    There is one record per cell.

    Raises:
        RecordError: a file is missing, holds no record, or has a line that is not a
            record of this schema version; names the file and the line.
    """
    found = []
    for path in paths:
        records = [record for _, record in _lines_of(path, is_finished=False)]
        if not records:
            raise RecordError(f"{path} holds no record; run a sweep into it first")
        found += records
    ordered = in_order(found)
    winners, newest = counting(ordered), newest_code(ordered)
    _note_left_out(ordered, list(winners.values()), newest)
    return [winners[cell_id] for cell_id in sorted(winners)], newest


def read_baseline(path: Path) -> list[Record]:
    """Return the records of a baseline, sorted by `cell_id`.

    A baseline is written completely and contains each cell once. Anything else in it,
    such as half a line or both sides of a merge, would make the check less strict.

    Raises:
        RecordError: see `read_records`; or the last line is incomplete, or a cell is in
            two lines.
    """
    lines: dict[str, tuple[int, Record]] = {}
    for number, record in _lines_of(path, is_finished=True):
        cell_id = record["cell_id"]
        if cell_id in lines:
            raise RecordError(
                f"{path}, line {number}: the cell of line {lines[cell_id][0]} again; a "
                "baseline holds each cell once, as `meft-report baseline` writes it"
            )
        lines[cell_id] = number, record
    if not lines:
        raise RecordError(
            f"{path} holds no record; write it with `meft-report baseline`"
        )
    return [lines[cell_id][1] for cell_id in sorted(lines)]


def _note_left_out(ordered: list[Record], winners: list[Record], newest: str) -> None:
    num_left_out = len(ordered) - len(winners)
    if num_left_out:
        num_failed = sum(record["status"] in FAILED for record in ordered) - sum(
            record["status"] in FAILED for record in winners
        )
        failures = f", {num_failed} of them failures" if num_failed else ""
        _note(f"left out {plural(num_left_out, 'record')} of cells run again{failures}")
    num_older = sum(code_of(record) != newest for record in winners)
    if num_older:
        _note(f"{plural(num_older, 'cell')} ran with older code than {newest:.8}")


def _lines_of(path: Path, *, is_finished: bool) -> Iterator[tuple[int, Record]]:
    """Yield the number of each line and its record.

    Args:
        path: the file.
        is_finished: whether every line must be complete. A run that was killed leaves a
            part of its last line, which is otherwise ignored, with a note.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"cannot read {path}: not a whole gzip file") from error
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    lines = re.split(rb"\r\n|\r|\n", content)
    unknown: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig")
            record = json.loads(
                text,
                parse_constant=_refuse_constant,
                object_pairs_hook=_refuse_duplicates,
            )
        except _NotFinite as error:
            raise RecordError(f"{where}: {error} is not a number in JSON") from error
        except _Duplicate as error:
            raise RecordError(
                f"{where}: {_quoted(str(error))} is in one object twice; keep one"
            ) from error
        except (ValueError, RecursionError) as error:
            # Every complete line ends in a newline, so text after the last one was
            # being written when its writer was killed.
            if number < len(lines):
                raise RecordError(f"{where}: not JSON ({error})") from error
            if is_finished:
                raise RecordError(
                    f"{where}: the last line is not whole ({error}); restore the file"
                ) from error
            _note(f"{where}: torn by a killed run, left out")
            break
        unknown |= _validate(record, where)
        yield number, record
    if unknown:
        names = [printable(name, SHORT_LENGTH) for name in sorted(unknown)]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        _note(
            f"{path}: fields this report does not know: {', '.join(names[:10])}{more}"
        )


class _NotFinite(Exception):
    """Raised for `NaN` or `Infinity`, which Python reads and JSON does not have."""


class _Duplicate(Exception):
    """Raised for a name that an object has twice, of which Python keeps the last."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Duplicate(next(name for name in names if names.count(name) > 1))
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _NotFinite(name)


def _validate(record: Any, where: str) -> set[str]:
    """Raise if this is not a record; return the names of unknown fields."""
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected a JSON object, got {_quoted(record)}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION or type(version) is not int:
        raise RecordError(
            f"{where}: schema version {_quoted(version)}, expected {SCHEMA_VERSION}; "
            "run its cells again with this meft-bench, or use the meft-report of the "
            "meft-bench that wrote it"
        )
    for section in SECTIONS:
        if not isinstance(record.get(section), dict):
            raise RecordError(f"{where}: `{section}` is missing or not an object")
    _check_versions(record["environment"].get("versions"), where)
    for column in COLUMNS:
        if column.section != "derived":
            value = lookup(record, column)
            _check_type(column, value, where)
            _check_range(column, value, record, where)
    if record["status"] not in STATUSES:
        status = printable(record["status"], SHORT_LENGTH)
        raise RecordError(f"{where}: {UnknownName('status', status, STATUSES)}")
    _check_derived(record, where)
    _check_time(record["started_at"], where)
    return {
        f"{section}.{key}"
        for section in SECTIONS
        for key in record[section]
        if key != "versions" and (key not in BY_NAME or BY_NAME[key].section != section)
    }


def _check_versions(versions: Any, where: str) -> None:
    if not isinstance(versions, dict):
        raise RecordError(f"{where}: `environment.versions` is not an object")
    for name, version in versions.items():
        if not isinstance(version, str):
            place = f"environment.versions.{printable(name, SHORT_LENGTH)}"
            raise RecordError(
                f"{where}: `{place}` should be a string, got {_quoted(version)}"
            )


def _check_time(text: str, where: str) -> None:
    """Raise for a time without an offset, which cannot be ordered among records."""
    try:
        has_offset = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        has_offset = False
    if not has_offset:
        raise RecordError(
            f"{where}: `started_at` should be a time in ISO 8601 with its offset from "
            f"UTC, such as 2026-01-02T03:04:05+00:00, got {_quoted(text)}"
        )


def _check_type(column: Column, value: Any, where: str) -> None:
    if value is None:
        if column.required:
            raise RecordError(f"{where}: `{_place(column)}` is missing")
        return
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "Int64": _is_integer(value),
        "Float64": _is_number(value),
        # An element is null if a number was not finite, as in JSON.
        "list": isinstance(value, list)
        and all(number is None or _is_number(number) for number in value),
    }
    if not fits[column.dtype]:
        raise RecordError(
            f"{where}: `{_place(column)}` should be {_EXPECTED[column.dtype]}, got "
            f"{_quoted(value)}"
        )


def _check_range(column: Column, value: Any, record: Record, where: str) -> None:
    """Raise for a number that no measurement can give, such as negative bytes.

    Args:
        column: the column of the value.
        value: a number, a list, or None.
        record: the record, which names the metric of a score.
        where: file and line, for the message.
    """
    if value is None or column.dtype in ("string", "boolean"):
        return
    least = 0.0 if column.unit else -math.inf
    greatest = column.greatest or GREATEST.get(column.unit, math.inf)
    if column.name in SCORE_NAMES:
        metric = record["measurement"].get(SCORE_NAMES[column.name])
        least = LEAST_SCORES.get(metric, least)
    for number in value if column.dtype == "list" else [value]:
        if number is None:
            continue
        if not (math.isfinite(number) and least <= number <= greatest + SLACK):
            raise RecordError(
                f"{where}: `{_place(column)}` should be {_range(column, least)}, got "
                f"{_quoted(number)}"
            )


def _check_derived(record: Record, where: str) -> None:
    """Raise for contradicting numbers, such as a peak below the model state."""
    seen = record["measurement"]
    for name, number in derive(seen).items():
        if number is None:
            continue
        column = BY_NAME[name]
        greatest = column.greatest or GREATEST[column.unit]
        if not 0 <= number <= greatest:  # exact: no float32 is involved
            _, *keys = DERIVED[name]
            sources = " and ".join(f"`{key}` {seen[key]}" for key in keys)
            raise RecordError(
                f"{where}: `{name}` should be {_range(column, 0.0)}, got "
                f"{_quoted(number)} from {sources}"
            )


def _range(column: Column, least: float) -> str:
    if column.greatest is not None:
        return f"from {least:g} to {column.greatest:g}"
    bounds = "a finite number" + (" of at least 0" if least == 0 else "")
    most = GREATEST.get(column.unit)
    return bounds if most is None else f"{bounds}, and of at most {most:g}"


_EXPECTED = {
    "string": "a string",
    "boolean": "true or false",
    "Int64": "a 64-bit integer",
    "Float64": "a number",
    "list": "a list of numbers",
}


def _place(column: Column) -> str:
    return ".".join(filter(None, [column.section, column.key]))


def _quoted(value: Any) -> str:
    return printable(repr(value), 60)


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_integer(value)


def lookup(record: Record, column: Column) -> Any:
    """Return the value of a column, in a record of `read_records`."""
    match column.section:
        case "":
            return record.get(column.key)
        case "versions":
            return record["environment"]["versions"].get(column.key)
        case section:
            value = record[section].get(column.key)
            return column.default if value is None else value


def _note(text: str) -> None:
    # If stderr cannot be written, the records are still valid.
    with contextlib.suppress(OSError):
        print(f"note: {printable(text, NOTE_LENGTH)}", file=sys.stderr)
