"""The columns and the digest of a file of rows, without reading all of it.

    csv:FILE, jsonl:FILE, parquet:FILE, dataset:DIR

A child reads the rows themselves (`meft_bench.child.tasks.row_files`).
"""

import csv
import json
from pathlib import Path
from typing import Any

from meft_bench.parent.own import digests
from meft_bench.shared.registry import nearest
from meft_bench.shared.row_kinds import FORMATS, TAB_SUFFIXES

DATASET_FILES = ("dataset_info.json", "state.json")


def is_place(text: object) -> bool:
    """Return whether a value of a sweep has the form of a place of rows."""
    return isinstance(text, str) and text.partition(":")[0] in FORMATS and ":" in text


def find(text: object, folder: Path, name: str) -> tuple[str, list[str], str]:
    """Return the place of rows, the names of their columns, and their digest.

    Args:
        text: what the sweep says.
        folder: where relative paths start.
        name: the field of the sweep that names the rows, for messages.

    Raises:
        ValueError: there is no such file, or no columns can be found in it.
    """
    if not is_place(text):
        ways = ", ".join(f"{one}:FILE" for one in FORMATS[:-1])
        raise ValueError(f"`{name}` = {text!r} should be {ways} or dataset:DIR")
    kind, _, given = str(text).partition(":")
    path = (folder / given).resolve()
    if kind == "dataset":
        columns, digest = _dataset(path, given)
    else:
        if not path.is_file():
            raise ValueError(f"`{name}`: there is no file {given!r}")
        if not path.stat().st_size:
            raise ValueError(f"`{name}`: file {given!r} is empty")
        columns, digest = _READERS[kind](path), digests.of_file(path)
    if not columns:
        raise ValueError(f"`{name}`: {given!r} has no columns")
    for column in columns:
        if columns.count(column) > 1:
            raise ValueError(f"`{name}`: {given!r} has two columns {column!r}")
    return f"{kind}:{path}", columns, digest


def check_column(column: str, columns: list[str], file: str, field: str) -> None:
    """Raise `ValueError` unless a file has a column."""
    if column not in columns:
        hint = nearest(column, columns)
        raise ValueError(f"`{field}`: {file} has no column {column!r}; {hint}")


def _csv(path: Path) -> list[str]:
    separator = "\t" if path.suffix in TAB_SUFFIXES else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return next(csv.reader(file, delimiter=separator), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not CSV in UTF-8: {error}") from error


def _jsonl(path: Path) -> list[str]:
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the first line is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: the first line is not a JSON object")
    return list(found)


def _parquet(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        return list(parquet.read_schema(path).names)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not Parquet: {reason}") from error


_READERS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}


def _dataset(path: Path, given: str) -> tuple[list[str], str]:
    if not path.is_dir():
        raise ValueError(f"there is no folder {given!r}")
    several = path / "dataset_dict.json"
    if several.is_file():
        splits = json.loads(several.read_bytes()).get("splits", [])
        raise ValueError(
            f"{given!r} has the splits {', '.join(splits)}: name one, as "
            f"dataset:{given}/{splits[0] if splits else 'SPLIT'}"
        )
    for name in DATASET_FILES:
        if not (path / name).is_file():
            raise ValueError(
                f"{given!r} has no {name}: expected a folder that "
                "`Dataset.save_to_disk` of the package datasets has written"
            )
    info: dict[str, Any] = json.loads((path / DATASET_FILES[0]).read_bytes())
    features = info.get("features") or {}
    files = digests.of_files(path, sorted(path.glob("*.arrow")))
    return list(features), digests.of_json([features, files])
