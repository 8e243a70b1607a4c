"""Formats in which tables can be written: `meft-report table NAME RUNS -o FILE`.

.md        Markdown, as on the terminal
.tex       LaTeX, a `table` with the rules of the package booktabs
.csv       rows of all tables in one table, as `one_table` defines it
.parquet   the same, with numbers next to the texts; units and meanings in the schema
.json      a list of tables (schema `meft-tables/1`), with texts, numbers and meanings

Each file has the same function, from tables to the content of a file. Cells are the
texts that a table shows, with their units, which Parquet and JSON complete with the
numbers themselves. `meft-report frame` writes the records, of which tables are made.
"""

from collections.abc import Callable, Sequence

from meft_reports.table_formats import csv_text, json_text, latex, markdown, parquet
from meft_reports.tables.table import Table

FORMATS: dict[str, Callable[[Sequence[Table]], bytes]] = {
    ".md": markdown.to_bytes,
    ".tex": latex.to_bytes,
    ".csv": csv_text.to_bytes,
    ".parquet": parquet.to_bytes,
    ".json": json_text.to_bytes,
}
"""Functions from tables to bytes, by the ending of the file."""
