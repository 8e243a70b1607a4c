"""Whether a JSON value is a record: its form, and the range of each number.

Both are defined by `meft_reports.columns`; this module does not depend on the harness.
"""

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from meft_reports.columns import (
    BY_NAME,
    COLUMNS,
    LEAST_SCORES,
    SCHEMA_VERSION,
    SCORE_NAMES,
    is_unbounded,
)
from meft_reports.columns.cell import STATUSES
from meft_reports.columns.column import Column
from meft_reports.derived import DERIVED, derive
from meft_reports.errors import RecordError, UnknownName
from meft_reports.text import SHORT_LENGTH, printable

SECTIONS = ("cell", "measurement", "environment")
GREATEST = {
    **{"bytes": 2.0**60, "seconds": 1e12, "count": 2.0**53},
    **{"joules": 1e12, "watts": 1e12, "megahertz": 1e12},
}
"""Maximum by unit, larger than any measurement, so that sums stay finite."""
LEAST = {
    **{"accumulation": 1.0, "batch_size": 1.0, "ranks": 1.0},
    **{"guard_perplexity": 1.0, "guard_start_perplexity": 1.0},
}
"""Minimum of numbers whose unit allows less."""
SUMS = {
    "sum_peak_allocated_bytes": "peak_allocated_bytes",
    "sum_saved_bytes": "saved_bytes",
}
"""Sums over ranks, and the number of one rank that they include."""
SLACK = 1e-6
"""Amount by which a share may exceed its bound, due to float32 rounding."""

Record = dict[str, Any]


def validate(record: Any, where: str) -> set[str]:
    """Check a record and return the names of unknown fields.

    Args:
        record: a JSON value.
        where: file and line, for the message.

    Raises:
        RecordError: this is not a record, or a number is out of its range.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected a JSON object, got {quoted(record)}")
    version = record.get("schema_version")
    if version is None and {"name", "entry"} <= record.keys():
        raise RecordError(
            f"{where}: this is a line of pytest's `--meft-records`, which `meft-report "
            "history` reads; other commands read records of meft-bench"
        )
    if version != SCHEMA_VERSION or type(version) is not int:
        raise RecordError(
            f"{where}: schema version {quoted(version)}, expected {SCHEMA_VERSION}; "
            "run its cells again with this meft-bench, or use the meft-report of the "
            "meft-bench that wrote it"
        )
    for section in SECTIONS:
        if not isinstance(record.get(section), dict):
            raise RecordError(f"{where}: `{section}` is missing or not an object")
    _check_versions(record["environment"].get("versions"), where)
    for column, read, fits in _CHECKS:
        value = read(record)
        if value is None:
            if column.required:
                raise RecordError(f"{where}: `{_place(column)}` is missing")
        elif not fits(value):
            raise RecordError(
                f"{where}: `{_place(column)}` should be {_EXPECTED[column.dtype]}, got "
                f"{quoted(value)}"
            )
        elif column.dtype not in ("string", "boolean"):
            _check_range(column, value, record, where)
    if record["status"] not in STATUSES:
        status = printable(record["status"], SHORT_LENGTH)
        raise RecordError(f"{where}: {UnknownName('status', status, STATUSES)}")
    _check_derived(record, where)
    check_time(record["started_at"], where)
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
                f"{where}: `{place}` should be a string, got {quoted(version)}"
            )


def check_time(text: str, where: str) -> None:
    """Raise for a time without an offset, which cannot be ordered among records.

    Args:
        text: the time.
        where: file and line, for the message.

    Raises:
        RecordError: it is no time in ISO 8601 with an offset.
    """
    try:
        has_offset = datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        has_offset = False
    if not has_offset:
        raise RecordError(
            f"{where}: `started_at` should be a time in ISO 8601 with its offset from "
            f"UTC, such as 2026-01-02T03:04:05+00:00, got {quoted(text)}"
        )


def _check_range(column: Column, value: Any, record: Record, where: str) -> None:
    """Raise for a number that no measurement can give, such as negative bytes.

    Args:
        column: the column of the value.
        value: a number or a list.
        record: the record, which names the metric of a score.
        where: file and line, for the message.
    """
    least = LEAST.get(column.name, 0.0 if column.unit else -math.inf)
    greatest = column.greatest or GREATEST.get(column.unit, math.inf)
    if column.name in SCORE_NAMES:
        metric = record["measurement"].get(SCORE_NAMES[column.name])
        least = LEAST_SCORES.get(metric, least)
        if isinstance(metric, str) and is_unbounded(metric):
            least, greatest = -math.inf, math.inf
    for number in value if column.dtype == "list" else [value]:
        if number is None:
            continue
        if not (math.isfinite(number) and least <= number <= greatest + SLACK):
            raise RecordError(
                f"{where}: `{_place(column)}` should be {_range(column, least)}, got "
                f"{quoted(number)}"
            )


def _check_derived(record: Record, where: str) -> None:
    """Raise for contradicting numbers, such as a peak below the model state."""
    seen = record["measurement"]
    for name, part in SUMS.items():
        whole, one = seen.get(name), seen.get(part)
        if whole is not None and one is not None and whole < one:
            raise RecordError(
                f"{where}: `measurement.{name}` should be at least `{part}`, which is "
                f"{quoted(one)}, got {quoted(whole)}"
            )
    for name, number in derive(seen).items():
        if number is None:
            continue
        column = BY_NAME[name]
        greatest = column.greatest or GREATEST.get(column.unit, math.inf)
        if not 0 <= number <= greatest:  # exact: no float32 is involved
            _, *keys = DERIVED[name]
            sources = " and ".join(f"`{key}` {seen[key]}" for key in keys)
            raise RecordError(
                f"{where}: `{name}` should be {_range(column, 0.0)}, got "
                f"{quoted(number)} from {sources}"
            )


def _range(column: Column, least: float) -> str:
    if column.greatest is not None:
        return f"from {least:g} to {column.greatest:g}"
    is_bounded = least > -math.inf
    bounds = "a finite number" + (f" of at least {least:g}" if is_bounded else "")
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


def quoted(value: Any) -> str:
    """Return a value as printable text of bounded length."""
    return printable(repr(value), 60)


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_integer(value)


def _is_list(value: Any) -> bool:
    # An element is null if a number was not finite, as in JSON.
    return isinstance(value, list) and all(
        number is None or _is_number(number) for number in value
    )


def _reader(column: Column) -> Callable[[Record], Any]:
    """Return the function that reads a column's value from a record."""
    key, section, default = column.key, column.section, column.default
    if section == "":
        return lambda record: record.get(key)
    if section == "versions":
        return lambda record: record["environment"]["versions"].get(key)

    def read(record: Record) -> Any:
        value = record[section].get(key)
        return default if value is None else value

    return read


READERS = {
    column.name: _reader(column) for column in COLUMNS if column.section != "derived"
}
"""By the name of a column: the function that reads its value from a valid record."""
_FITS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "Int64": _is_integer,
    "Float64": _is_number,
    "list": _is_list,
}
_CHECKS = [
    (BY_NAME[name], read, _FITS[BY_NAME[name].dtype]) for name, read in READERS.items()
]
