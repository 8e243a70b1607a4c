"""Tables as Parquet: columns of text."""

from collections.abc import Sequence
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from meft_reports.table_formats.one_table import columns_of
from meft_reports.tables.table import Table


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of Parquet."""
    columns = columns_of(tables)
    schema = pa.schema([(name, pa.string()) for name in columns])
    buffer = BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()
