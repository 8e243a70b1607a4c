"""Tables as one table of rows, for formats whose files hold a single one.

    table    the header of the tables ...   notes

`table` is the title of the table that a row is from, and `notes` are its notes. Between
them is every column of any of the tables, in the order in which they first occur; a row
is null in those that its table does not have. A name that occurs in a header again gets
a number: `error`, `error (2)`. A dash is null.
"""

from collections import Counter
from collections.abc import Sequence

from meft_reports.format import NOTHING
from meft_reports.tables.table import Table

TITLE = "table"
NOTES = "notes"


def columns_of(tables: Sequence[Table]) -> dict[str, list[str | None]]:
    """Return the rows of all tables, by column.

    Args:
        tables: at least one table.
    """
    headers = [_numbered((TITLE, *table.header, NOTES)) for table in tables]
    names = [name for header in headers for name in header if name != NOTES]
    columns: dict[str, list[str | None]] = {name: [] for name in [*names, NOTES]}
    for table, header in zip(tables, headers, strict=True):
        notes = " ".join(table.notes) or None
        for row in table.rows:
            cells = (table.title, *map(value_of, row), notes)
            values = dict(zip(header, cells, strict=True))
            for name, column in columns.items():
                column.append(values.get(name))
    return columns


def meanings_of(tables: Sequence[Table]) -> dict[str, str]:
    """Return what the columns of `columns_of` hold, by name.

    Where a column has another meaning in another table, both are stated.
    """
    found: dict[str, dict[str, None]] = {
        TITLE: {"Title of the table of the row.": None}
    }
    for table in tables:
        names = _numbered((TITLE, *table.header))[1:]
        for name, column in zip(names, table.columns, strict=True):
            found.setdefault(name, {})[column.meaning] = None
    found[NOTES] = {"Notes of the table of the row.": None}
    return {name: " / ".join(meanings) for name, meanings in found.items()}


def value_of(cell: str) -> str | None:
    """Return the text of a cell; None for a dash, which is null."""
    return None if cell == NOTHING else cell


def _numbered(names: Sequence[str]) -> list[str]:
    """Return names, of which each is there once."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found
