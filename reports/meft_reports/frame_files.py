"""A frame as a file: Parquet or CSV.

Parquet stores lists as lists, and the unit and the meaning of each column as metadata
of its field, `{"unit": "bytes", "meaning": ...}`; a column without a unit has no `unit`
there. CSV stores lists as JSON, null as an empty field, and a text that a spreadsheet
would treat as a formula with a preceding `'`.
"""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from meft_reports.columns import COLUMNS
from meft_reports.columns.column import Column
from meft_reports.errors import UnknownName
from meft_reports.files import write_atomically
from meft_reports.frame import typed

FORMULA_STARTS = tuple("=+-@＝＋－＠'")  # noqa: RUF001 (full-width ones are meant)
"""Characters that a spreadsheet treats as the start of a formula in a CSV field.

The list includes full-width characters, and the mark that prevents a formula; leading
spaces are ignored.
"""


def save_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write the frame as Parquet or CSV, by the suffix of `path`.

    Raises:
        UnknownName: the suffix is neither `.parquet` nor `.csv`.
    """
    writers = {".parquet": _parquet, ".csv": _csv}
    if path.suffix not in writers:
        raise UnknownName("ending", path.suffix, writers)
    write_atomically(path, writers[path.suffix](frame))


def load_frame(path: str | Path) -> pd.DataFrame:
    """Read a file of `save_frame`: the same values with the same dtypes."""
    path = Path(path)
    if path.suffix == ".parquet":
        columns = pq.read_table(path).to_pydict()
        return typed(columns)
    raw = pd.read_csv(path, dtype=str, keep_default_na=False)
    return typed({c.name: [_parse(text, c) for text in raw[c.name]] for c in COLUMNS})


def _parse(text: str, column: Column) -> Any:
    """Return the value of one field of a CSV file; empty is null."""
    if not text and not (column.required and column.dtype == "string"):
        return column.default
    match column.dtype:
        case "string":
            return text.removeprefix("'")
        case "boolean":
            return text == "True"
        case "Int64":
            return int(text)
        case _:
            return json.loads(text)


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def not_a_formula(text: str) -> str:
    """Return a text as a field of CSV that a spreadsheet does not calculate."""
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text


_ARROW_TYPES = {
    "string": pa.string(),
    "boolean": pa.bool_(),
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "list": pa.list_(pa.float64()),
}


def _parquet(frame: pd.DataFrame) -> bytes:
    schema = pa.schema(map(_field, COLUMNS))
    buffer = BytesIO()
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _field(column: Column) -> pa.Field:
    metadata = {"meaning": column.meaning}
    if column.unit:
        metadata["unit"] = column.unit
    return pa.field(column.name, _ARROW_TYPES[column.dtype], metadata=metadata)


def _csv(frame: pd.DataFrame) -> bytes:
    text = frame.copy()
    for column in COLUMNS:
        if column.dtype == "list":
            text[column.name] = [
                None if value is None else json.dumps([*map(_or_null, value)])
                for value in frame[column.name]
            ]
        if column.dtype == "string":
            text[column.name] = frame[column.name].map(
                not_a_formula, na_action="ignore"
            )
    return text.to_csv(index=False, lineterminator="\n").encode()
