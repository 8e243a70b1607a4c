"""Environment: machine, code and packages of the cells."""

import json

import pandas as pd

from meft_reports.format import format_fact
from meft_reports.summary import split, with_torch_known
from meft_reports.tables.table import Heading, Table

NEEDS = "any cell"
"""What the records must hold for there to be a table."""
COLUMNS = (
    Heading("fact", "What is known about the machine, the code or a package."),
    Heading("value", "Its value; of a package, the version."),
)


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per distinct environment of the cells."""
    fields = {
        "machine": "machine",
        "cpu": "processor",
        "device_name": "accelerator",
        "platform": "platform",
        "num_threads": "threads per cell",
        "num_slots": "cells side by side",
        "commit": "commit",
        "dirty": "tracked files changed since",
        "code_sha256": "digest of the code that ran",
    }
    parts = list(split(with_torch_known(frame), [*fields, "versions"]))
    tables = []
    for number, (key, part) in enumerate(parts, start=1):
        rows = [(words, format_fact(key[name])) for name, words in fields.items()]
        rows += sorted(json.loads(key["versions"]).items())
        cells = "1 cell" if len(part) == 1 else f"{len(part)} cells"
        place = f" {number} of {len(parts)}" if len(parts) > 1 else ""
        tables.append(
            Table(
                title=f"Environment{place} ({cells})",
                columns=COLUMNS,
                rows=tuple(rows),
                num_text_columns=2,
            )
        )
    return tables
