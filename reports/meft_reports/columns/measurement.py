"""Columns of the measurement of a cell.

The data is `measurements.toml`, which the harness reads as well.
"""

from typing import Any

from meft_reports.columns.column import Column, Dtype
from meft_reports.data_files import MEASUREMENTS, read_tables
from meft_reports.errors import ReportError

OLD_SCORE_NAMES = {
    "exact_match": "contains",
    "exact_match_any_case": "contains_any_case",
    "number": "last_number",
}
"""Names of the scores of questions in older code, and their current names.

Older code called containment exact match, which is another rule today, and `number` the
number after the last `####`, or the whole answer if there was none.
"""

_DTYPES: dict[str, Dtype] = {
    "int": "Int64",
    "float": "Float64",
    "str": "string",
    "list[int]": "list",
    "list[float]": "list",
    "list[float | None]": "list",
}
_LOWER_IS_BETTER = {"lower": True, "higher": False, None: None}
_UNITS = ("", "bytes", "seconds", "count", "fraction")
_REQUIRED = ("group", "type", "meaning", "how")
_KNOWN = (*_REQUIRED, "unit", "better", "maximum", "derived")


def _column(name: str, fields: dict[str, Any]) -> Column:
    for key, allowed in (
        ("type", _DTYPES),
        ("better", _LOWER_IS_BETTER),
        ("unit", _UNITS),
    ):
        if key in fields and fields[key] not in allowed:
            valid = ", ".join(filter(None, allowed))
            raise ReportError(
                f"{MEASUREMENTS}: [{name}]: `{key}` is {fields[key]!r}; valid: {valid}"
            )
    return Column(
        name=name,
        section="derived" if fields.get("derived") else "measurement",
        dtype=_DTYPES[fields["type"]],
        unit=fields.get("unit", ""),
        lower_is_better=_LOWER_IS_BETTER[fields.get("better")],
        greatest=fields.get("maximum"),
        meaning=fields["meaning"],
        group=fields["group"],
        how=fields["how"],
    )


MEASUREMENT: tuple[Column, ...] = tuple(
    _column(name, fields)
    for name, fields in read_tables(
        MEASUREMENTS, required=_REQUIRED, known=_KNOWN
    ).items()
)
"""Every number of a measurement, in the order of the file."""
