"""Tables as CSV, with null as an empty field.

A text that a spreadsheet would treat as a formula has a preceding `'`. Signed numbers
and intervals of them, such as `-0.012 to +0.03`, are no formulas.
"""

import csv
import io
import re
from collections.abc import Sequence

from meft_reports.frame_files import not_a_formula
from meft_reports.table_formats.one_table import columns_of
from meft_reports.tables.table import Table

_SIGNED = re.compile(r"[+-][0-9.,]+( %)?( to [+-][0-9.,]+)?")


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of CSV."""
    columns = columns_of(tables)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_field, columns))
    for row in zip(*columns.values(), strict=True):
        writer.writerow(map(_field, row))
    return buffer.getvalue().encode()


def _field(text: str | None) -> str:
    if text is None or _SIGNED.fullmatch(text):
        return text or ""
    return not_a_formula(text)
