"""Tables as Parquet: numbers with their units, and the texts that the tables show.

The rows of all tables are one table, as `one_table` defines it. A column without a
number holds texts. A column `peak` with numbers becomes

    peak                the numbers themselves, null where there is none
    peak (spread)       likewise what a text states beside the number, here a spread
    peak, as shown      the texts, with the words that replace or qualify a number

A field of the schema has the metadata `unit`, if the numbers have one, and `meaning`.
Where tables have numbers of several units in one column, each unit has a field of its
own: `peak [bytes]`, `peak [seconds]`.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meft_reports.format import ShownNumber
from meft_reports.table_formats.one_table import columns_of, meanings_of
from meft_reports.tables.table import Table


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of Parquet."""
    meanings = meanings_of(tables)
    fields = [
        field
        for name, cells in columns_of(tables).items()
        for field in _fields(name, cells, meanings[name])
    ]
    schema = pa.schema([field for field, _ in fields])
    buffer = BytesIO()
    pq.write_table(pa.table([cells for _, cells in fields], schema=schema), buffer)
    return buffer.getvalue()


def _fields(
    name: str, cells: Sequence[str | None], meaning: str
) -> Iterator[tuple[pa.Field, list[Any]]]:
    """Yield the fields of a column of texts, each with its cells."""
    numbers = [cell for cell in cells if isinstance(cell, ShownNumber)]
    units = list(dict.fromkeys(cell.unit for cell in numbers))
    for unit in units:
        own = f"{name} [{unit or 'no unit'}]" if len(units) > 1 else name
        same = [cell for cell in numbers if cell.unit == unit]
        for part in dict.fromkeys(key for cell in same for key in cell.values):
            values = [_number(cell, unit, part) for cell in cells]
            said = f"{part} of this: {meaning}" if part else meaning
            metadata = {"meaning": said} | ({"unit": unit} if unit else {})
            label = _label(own, part, numbers)
            # Means of bytes have fractions, so that only counts are integers.
            kind = pa.int64() if unit == "count" else pa.float64()
            yield _field(label, kind, metadata), values
    shown = f"{name}, as shown" if numbers else name
    yield _field(shown, pa.string(), {"meaning": meaning}), list(cells)


def _label(name: str, part: str, numbers: Sequence[ShownNumber]) -> str:
    """Return the name of a field; that of the column may name a part already."""
    parts = {key for cell in numbers for key in cell.values if key}
    for one in parts:
        name = name.removesuffix(f" ({one})")
    return f"{name} ({part})" if part else name


def _number(cell: str | None, unit: str, part: str) -> float | None:
    if not isinstance(cell, ShownNumber) or cell.unit != unit:
        return None
    return cell.values.get(part)


def _field(name: str, kind: pa.DataType, metadata: dict[str, str]) -> pa.Field:
    return pa.field(name, kind, metadata=metadata)
