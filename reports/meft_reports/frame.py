"""The one door to records: files of JSON lines in, one tidy table out.

One row per cell, one column per fact of `meft_reports.columns`, nullable dtypes, bytes
as integers. When a cell appears more than once the latest ok record wins, or the
latest one if none is ok. Every status is kept. What a record must look like is decided
by the table of facts; this module does not know the harness.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from meft_reports.columns import BY_NAME, COLUMNS, SCHEMA_VERSION
from meft_reports.columns.column import Column
from meft_reports.columns.measurement import OLD_SCORE_NAMES
from meft_reports.errors import RecordError, UnknownName
from meft_reports.files import write_atomically

STATUSES = ("ok", "oom", "timeout", "killed", "error", "skipped")
SECTIONS = ("cell", "measurement", "environment")


def read_frame(paths: Sequence[Path]) -> pd.DataFrame:
    """The records of `paths` as one tidy table, sorted by `cell_id`.

    Raises:
        RecordError: a file is missing, holds no record, or has a line that is not a
            record of this schema version; names the file and the line.
    """
    return to_frame(read_records(paths))


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of `paths` as JSON objects: one per cell, sorted by `cell_id`.

    Raises:
        RecordError: as `read_frame`.
    """
    winners: dict[str, dict[str, Any]] = {}
    num_superseded = num_hidden = 0
    for path in paths:
        found = list(_records_of(path))
        if not found:
            raise RecordError(f"{path} holds no record; run a sweep into it first")
        for record in found:
            known = winners.get(record["cell_id"])
            if known is None:
                winners[record["cell_id"]] = record
                continue
            loser, winner = sorted([known, record], key=_rank)
            winners[record["cell_id"]] = winner
            num_superseded += 1
            num_hidden += loser["started_at"] > winner["started_at"]
    if num_superseded:
        hidden = f", {num_hidden} of them later failures" if num_hidden else ""
        _note(f"{num_superseded} records of cells run again left out{hidden}")
    return [winners[cell_id] for cell_id in sorted(winners)]


def to_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row per record, by `cell_id`, with the columns and dtypes of `COLUMNS`."""
    rows = sorted(map(_flatten, records), key=lambda row: str(row["cell_id"]))
    return _typed({c.name: [row[c.name] for row in rows] for c in COLUMNS})


def save_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write the frame as Parquet or CSV, by the ending of `path`.

    Parquet holds lists as lists; CSV holds them as JSON, and null as an empty field.

    Raises:
        UnknownName: the ending is neither `.parquet` nor `.csv`.
    """
    writers = {".parquet": _parquet, ".csv": _csv}
    if path.suffix not in writers:
        raise UnknownName("ending", path.suffix, writers)
    write_atomically(path, writers[path.suffix](frame))


def load_frame(path: Path) -> pd.DataFrame:
    """The inverse of `save_frame`: the same values with the same dtypes."""
    if path.suffix == ".parquet":
        columns = pq.read_table(path).to_pydict()
        return _typed(columns)
    raw = pd.read_csv(path, dtype=str, keep_default_na=False)
    return _typed({c.name: [_parse(text, c) for text in raw[c.name]] for c in COLUMNS})


def _parse(text: str, column: Column) -> Any:
    """The value that one field of a CSV file stands for; empty is null."""
    if not text and not (column.required and column.dtype == "string"):
        return column.default
    match column.dtype:
        case "string":
            return text
        case "boolean":
            return text == "True"
        case "Int64":
            return int(text)
        case _:
            return json.loads(text)


def _records_of(path: Path) -> Iterable[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    lines = re.split(rb"\r\n|\r|\n", content)
    unknown: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            # Every complete line ends in a newline, so what follows the last one was
            # being written when its writer was killed.
            if number == len(lines):
                _note(f"{where}: torn by a killed run, left out")
                return
            raise RecordError(f"{where}: not JSON ({error})") from error
        unknown |= _validate(record, where)
        yield record
    if unknown:
        _note(f"{path}: fields this report does not know: {', '.join(sorted(unknown))}")


def _validate(record: Any, where: str) -> set[str]:
    """Refuse what is not a record; the names of fields the table does not hold."""
    if not isinstance(record, dict):
        raise RecordError(f"{where}: expected a JSON object, got {record!r:.60}")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{where}: schema version {version!r}, expected {SCHEMA_VERSION}; "
            "use the meft-report of the meft-bench that wrote it"
        )
    for section in SECTIONS:
        if not isinstance(record.get(section), dict):
            raise RecordError(f"{where}: `{section}` is missing or not an object")
    if not isinstance(record["environment"].get("versions"), dict):
        raise RecordError(f"{where}: `environment.versions` is not an object")
    for column in COLUMNS:
        if column.section != "derived":
            _check_value(column, _lookup(record, column), where)
    if record["status"] not in STATUSES:
        raise RecordError(
            f"{where}: {UnknownName('status', record['status'], STATUSES)}"
        )
    return {
        f"{section}.{key}"
        for section in SECTIONS
        for key in record[section]
        if key != "versions" and (key not in BY_NAME or BY_NAME[key].section != section)
    }


def _check_value(column: Column, value: Any, where: str) -> None:
    place = ".".join(filter(None, [column.section, column.key]))
    if value is None:
        if column.required:
            raise RecordError(f"{where}: `{place}` is missing")
        return
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "Int64": _is_integer(value),
        "Float64": _is_number(value),
        # An element is null where a number was not finite, as JSON has it.
        "list": isinstance(value, list)
        and all(number is None or _is_number(number) for number in value),
    }
    if not fits[column.dtype]:
        raise RecordError(
            f"{where}: `{place}` should be {_EXPECTED[column.dtype]}, got {value!r:.60}"
        )


_EXPECTED = {
    "string": "a string",
    "boolean": "true or false",
    "Int64": "a 64-bit integer",
    "Float64": "a number",
    "list": "a list of numbers",
}


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_integer(value)


def _lookup(record: dict[str, Any], column: Column) -> Any:
    match column.section:
        case "":
            return record.get(column.key)
        case "versions":
            return record["environment"]["versions"].get(column.key)
        case section:
            value = record[section].get(column.key)
            return column.default if value is None else value


def _rank(record: dict[str, Any]) -> tuple[bool, str]:
    return record["status"] == "ok", record["started_at"]


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    row = {c.name: _lookup(record, c) for c in COLUMNS if c.section != "derived"}
    if row["loss_mean"] is None:  # from before scores had the names of their rules
        row["score_name"] = OLD_SCORE_NAMES.get(row["score_name"], row["score_name"])
    row["source"] = "measured" if row["prediction"] is None else "predicted"
    row["versions"] = json.dumps(record["environment"]["versions"], sort_keys=True)
    trainable, total = row["num_trainable_parameters"], row["num_parameters"]
    known = trainable is not None and total
    row["trainable_fraction"] = trainable / total if known else None
    peak, resting = row["peak_allocated_bytes"], row["resting_bytes"]
    known = peak is not None and resting is not None
    row["peak_activation_bytes"] = peak - resting if known else None
    up, down = row["h2d_bytes"], row["d2h_bytes"]
    row["transfer_bytes"] = None if up is None or down is None else up + down
    return row


def _typed(columns: dict[str, list[Any]]) -> pd.DataFrame:
    return pd.DataFrame({c.name: _series(columns[c.name], c) for c in COLUMNS})


def _series(values: list[Any], column: Column) -> "pd.Series[Any]":
    match column.dtype:
        case "list":
            # Element by element: pandas would make a table of lists of equal length.
            lists = np.empty(len(values), dtype=object)
            for index, value in enumerate(values):
                lists[index] = None if value is None else list(map(_float, value))
            return pd.Series(lists, dtype=object)
        case "Float64":
            # A number that is not finite cannot be compared or averaged: null.
            finite = [
                value if value is not None and math.isfinite(value) else None
                for value in values
            ]
            return pd.Series(finite, dtype="Float64")
        case "string" if not column.required and column.default is None:
            return pd.Series([value or None for value in values], dtype="string")
        case dtype:
            return pd.Series(values, dtype=dtype)


def _float(number: float | None) -> float:
    """A list's element: what is not a number in JSON is not a number here."""
    return math.nan if number is None else float(number)


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


_ARROW_TYPES = {
    "string": pa.string(),
    "boolean": pa.bool_(),
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "list": pa.list_(pa.float64()),
}


def _parquet(frame: pd.DataFrame) -> bytes:
    schema = pa.schema([(c.name, _ARROW_TYPES[c.dtype]) for c in COLUMNS])
    buffer = BytesIO()
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _csv(frame: pd.DataFrame) -> bytes:
    text = frame.copy()
    for column in COLUMNS:
        if column.dtype == "list":
            text[column.name] = [
                None if value is None else json.dumps([*map(_or_null, value)])
                for value in frame[column.name]
            ]
    return text.to_csv(index=False, lineterminator="\n").encode()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
