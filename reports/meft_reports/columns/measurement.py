"""Columns of the measurement of a cell.

The data is `measurements.toml`, which the harness reads as well.
"""

from typing import Any

from meft_reports.columns.cell import CELL
from meft_reports.columns.column import UNITS, Column, Dtype
from meft_reports.columns.environment import ENVIRONMENT
from meft_reports.data_files import MEASUREMENTS, path_of, read_tables
from meft_reports.derived import DERIVED
from meft_reports.errors import ReportError
from meft_reports.field_kinds import FLAG, NUMBER, TEXT, one_of

GROUPS = (
    *("memory", "transfer", "time", "gpu", "quality", "start", "exactness"),
    "model",
)
"""The sections of docs/numbers.md."""

OLD_SCORE_NAMES = {
    "exact_match": "contains",
    "exact_match_any_case": "contains_any_case",
    "number": "last_number",
}
"""Names of the scores of questions in older code, and their current names.

Older code called containment exact match, which is another rule today, and `number` the
number after the last `####`, or the whole answer if there was none.
"""


def current_score_name(name: str | None, loss_mean: str | None) -> str | None:
    """Return the current name of the metric of a score.

    Args:
        name: the name in a record; None if it has none.
        loss_mean: what the record's losses are averaged over; None in older records.
    """
    if name is None or loss_mean is not None:
        return name
    return OLD_SCORE_NAMES.get(name, name)


_DTYPES: dict[str, Dtype] = {
    "int": "Int64",
    "float": "Float64",
    "str": "string",
    "list[int]": "list",
    "list[float]": "list",
    "list[float | None]": "list",
}
_LOWER_IS_BETTER = {"lower": True, "higher": False, None: None}
_SCHEMA = {
    "group": one_of(GROUPS),
    "type": one_of(_DTYPES),
    "unit": one_of(UNITS),
    "better": one_of(["lower", "higher"]),
    "maximum": NUMBER,
    "derived": FLAG,
    "predicted": FLAG,
    "shared": FLAG,
    "meaning": TEXT,
    "how": TEXT,
}
_REQUIRED = ("group", "type", "meaning", "how")


def _column(name: str, fields: dict[str, Any]) -> Column:
    return Column(
        name=name,
        section="derived" if fields.get("derived") else "measurement",
        dtype=_DTYPES[fields["type"]],
        unit=fields.get("unit", ""),
        is_predicted=bool(fields.get("predicted")),
        is_shared=bool(fields.get("shared")),
        lower_is_better=_LOWER_IS_BETTER[fields.get("better")],
        greatest=fields.get("maximum"),
        meaning=fields["meaning"],
        group=fields["group"],
        how=fields["how"],
    )


def _read() -> tuple[Column, ...]:
    tables = read_tables(MEASUREMENTS, required=_REQUIRED, schema=_SCHEMA)
    path = path_of(MEASUREMENTS)
    for column in (*CELL, *ENVIRONMENT):
        if column.name in tables:
            raise ReportError(
                f"{path}: [{column.name}]: is another column of the frame already"
            )
    for name, fields in tables.items():
        if fields.get("derived", False) != (name in DERIVED):
            raise ReportError(
                f"{path}: [{name}]: `derived` = true should be set where "
                "meft_reports/derived.py has a formula, which it has for "
                f"{', '.join(DERIVED)}"
            )
    for name, (_, *sources) in DERIVED.items():
        for wanted in (name, *sources):
            if wanted not in tables:
                raise ReportError(
                    f"{path}: no [{wanted}], which meft_reports/derived.py has in its "
                    f"formula of {name!r}"
                )
    return tuple(_column(name, fields) for name, fields in tables.items())


MEASUREMENT = _read()
"""Every number of a measurement, in the order of the file."""
