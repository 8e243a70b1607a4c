"""Records as one tidy table.

There is one row per cell and one column per entry of `meft_reports.columns`, with
nullable dtypes and bytes as integers. Cells of every status are kept. Texts are
printable and of bounded length, as returned by `text`.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from meft_reports.aliases import with_aliases
from meft_reports.columns import BY_NAME, COLUMNS
from meft_reports.columns.column import Column
from meft_reports.columns.measurement import current_score_name
from meft_reports.derived import DERIVED, derive
from meft_reports.errors import RecordError
from meft_reports.latest import code_of, in_order, newest_code
from meft_reports.records import read_records
from meft_reports.text import SHORT_LENGTH, printable, printable_lines
from meft_reports.valid_records import READERS

MAX_VERSIONS = 100
"""Number of packages of an environment that the frame keeps, in order of names."""


def read_frame(paths: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Read one or more files of records as one tidy table, sorted by `cell_id`.

    Methods, backbones and tasks of the user have their short names.

    Raises:
        RecordError: a file is missing, holds no record, or has a line that is not a
            record of this schema version; names the file and the line.
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    records, newest = read_records([Path(path) for path in several], breakdowns=False)
    return to_frame(with_aliases(records), newest)


def to_frame(
    records: Iterable[dict[str, Any]], newest: str | None = None
) -> pd.DataFrame:
    """Return one row per record, by `cell_id`, with the columns of `COLUMNS`.

    The dtypes are those of `COLUMNS`.

    Args:
        records: valid records of distinct cells.
        newest: digest of the newest code; by default that of the last of `records`.

    Raises:
        RecordError: two cells have the same name after conversion to printable text.
    """
    records = list(records)
    if newest is None:
        newest = newest_code(in_order(records)) if records else ""
    records.sort(key=lambda record: printable(record["cell_id"]))
    columns = _columns(records, newest)
    for name, following in itertools.pairwise(columns["cell_id"]):
        if name == following:
            raise RecordError(
                f"two cells are both shown as {name!r}; rename one of them"
            )
    return typed(columns)


def _columns(records: Sequence[dict[str, Any]], newest: str) -> dict[str, list[Any]]:
    """Return the values of every column, in the order of the records."""
    found = {}
    for name, read in READERS.items():
        values = map(read, records)
        shown = printable_lines if BY_NAME[name].has_lines else printable
        found[name] = [shown(v) if isinstance(v, str) else v for v in values]
    names = zip(found["score_name"], found["loss_mean"], strict=True)
    found["score_name"] = [  # older code used other names of scores
        current_score_name(name, mean) for name, mean in names
    ]
    found["source"] = [
        "measured" if how is None else "predicted" for how in found["prediction"]
    ]
    found["versions"] = [
        _versions(tuple(sorted(record["environment"]["versions"].items())))
        for record in records
    ]
    found["newest_code"] = [code_of(record) == newest for record in records]
    derived = [derive(record["measurement"]) for record in records]
    return found | {name: [each[name] for each in derived] for name in DERIVED}


@functools.cache
def _versions(versions: tuple[tuple[str, str], ...]) -> str:
    texts = {
        printable(name, SHORT_LENGTH): printable(version, SHORT_LENGTH)
        for name, version in versions[:MAX_VERSIONS]
    }
    return json.dumps(texts, sort_keys=True)


def typed(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Return columns of Python values as a frame with the dtypes of `COLUMNS`."""
    return pd.DataFrame({c.name: _series(columns[c.name], c) for c in COLUMNS})


def _series(values: list[Any], column: Column) -> "pd.Series[Any]":
    match column.dtype:
        case "list":
            # Element by element: pandas would make a table of lists of equal length.
            lists = np.empty(len(values), dtype=object)
            for index, value in enumerate(values):
                # An empty list says as little as none.
                lists[index] = list(map(_float, value)) if value else None
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
    """Return a list's element as float; null in JSON becomes NaN."""
    return math.nan if number is None else float(number)
