"""The definition of every column of the frame, in one table.

The location of a value in a record, its dtype, its unit, whether lower is better and
its meaning are defined only here: those of the measurement in `measurements.toml`. The
reader, the tables, the page's legend, docs/numbers.md and the thresholds of `check` all
use `COLUMNS`.
"""

from meft_reports.columns.cell import CELL
from meft_reports.columns.column import Column
from meft_reports.columns.environment import ENVIRONMENT
from meft_reports.columns.measurement import MEASUREMENT
from meft_reports.errors import UnknownName

SCHEMA_VERSION = 2
"""The version of the record format that this table describes."""

COLUMNS: tuple[Column, ...] = (*CELL, *MEASUREMENT, *ENVIRONMENT)
"""Every column, in the order of the frame."""

BY_NAME = {column.name: column for column in COLUMNS}
CELL_FIELDS = tuple(column.name for column in COLUMNS if column.section == "cell")
MEASURED = tuple(column for column in COLUMNS if column.comparable)
"""The columns that `check` compares; for lists, the worst entry.

Derived columns are not in a record, so `baseline` reports the columns they are derived
from.
"""

SCORE_NAMES = {
    "score": "score_name",
    "majority_score": "score_name",
    "second_score": "second_score_name",
    "second_majority_score": "second_score_name",
    "third_score": "third_score_name",
    "third_majority_score": "third_score_name",
}
"""The column that names the metric of each score."""

LEAST_SCORES = {"matthews_correlation": -1.0, "pearson": -1.0, "spearman": -1.0}
"""Minimum of scores that can be negative; any other score is at least 0."""
UNBOUNDED_SCORES = ("log_likelihood_per_token", "perplexity")
OWN_SCORE = "own:"


def is_unbounded(metric: str | None) -> bool:
    """Return whether a score can be any number: those of a user's own metric can."""
    return metric is not None and (
        metric in UNBOUNDED_SCORES or metric.startswith(OWN_SCORE)
    )


def find_measured(name: str) -> Column:
    """Return the measured column called `name`, in full or without `_bytes`.

    Raises:
        UnknownName: no column that can be compared has this name.
    """
    for column in MEASURED:
        if name in (column.name, column.short_name):
            return column
    raise UnknownName("column", name, [column.short_name for column in MEASURED])
