"""Tables as JSON, for programs: their title, header, rows and notes."""

import json
from collections.abc import Sequence

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
                "num_text_columns": table.num_text_columns,
                "rows": [[*map(value_of, row)] for row in table.rows],
                "notes": table.notes,
            }
            for table in tables
        ],
    }
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()
