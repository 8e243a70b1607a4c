"""Tables as JSON, for programs: their title, header, rows and notes.

rows       the texts that the table shows
numbers    of each row: null for a text, or `{"unit": ..., "value": ...}` with
           further numbers by name (`spread`, `low`, `high`); `value` is absent
           where only those are known
columns    names and meanings
"""

import json
from collections.abc import Sequence
from typing import Any

from meft_reports.format import ShownNumber
from meft_reports.table_formats.one_table import value_of
from meft_reports.tables.table import Table

SCHEMA = "meft-tables/1"


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of JSON; a dash is null."""
    value = {
        "schema": SCHEMA,
        "tables": [
            {
                "title": table.title,
                "header": table.header,
                "columns": [column._asdict() for column in table.columns],
                "num_text_columns": table.num_text_columns,
                "rows": [[*map(value_of, row)] for row in table.rows],
                "numbers": [[*map(_number, row)] for row in table.rows],
                "notes": table.notes,
            }
            for table in tables
        ],
    }
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def _number(cell: str) -> dict[str, Any] | None:
    if not isinstance(cell, ShownNumber):
        return None
    return {"unit": cell.unit} | {n or "value": v for n, v in cell.values.items()}
