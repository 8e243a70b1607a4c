"""Numbers of the run in the Bencher Metric Format."""

import json

from meft_reports.check import CheckResult
from meft_reports.text import printable

MOST_CHARACTERS = 1024
"""Length of the longest name that Bencher takes."""


def to_bmf(result: CheckResult) -> str:
    """Return the compared numbers of the run, by cell and measure."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in result.compared:
        name = printable(one.cell_id, MOST_CHARACTERS)
        measure = one.column.short_name.replace("_", "-")
        found.setdefault(name, {})[measure] = {"value": one.after}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"
