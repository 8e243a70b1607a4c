"""The measurement of a cell: every number by its name, None where it was not measured.

The names and types are those of `measurements.toml`, which the reports read as well and
which defines what each number means and how it is measured.
"""

import dataclasses
from typing import Any, NoReturn

from meft_bench.shared import tables
from meft_bench.shared.cell import Cell
from meft_bench.shared.field_kinds import FLAG, NUMBER, TEXT, one_of
from meft_bench.shared.registry import nearest

GROUPS = (
    *("memory", "transfer", "time", "gpu", "quality", "start", "exactness"),
    "model",
)
"""The sections of docs/numbers.md."""
UNITS = ("bytes", "seconds", "joules", "watts", "megahertz", "count", "fraction")

_TYPES: dict[str, Any] = {
    "int": int | None,
    "float": float | None,
    "str": str | None,
    "list[int]": list[int] | None,
    "list[float]": list[float] | None,
    "list[float | None]": list[float | None] | None,
}
_SCHEMA = {
    "group": one_of(GROUPS),
    "type": one_of(_TYPES),
    "unit": one_of(UNITS),
    "better": one_of(["lower", "higher"]),
    "maximum": NUMBER,
    "derived": FLAG,
    "predicted": FLAG,
    "shared": FLAG,
    "meaning": TEXT,
    "how": TEXT,
}
_OF_RANKS = ("memory", "transfer")
_REQUIRED = ("type", "group", "meaning", "how")


def _read() -> dict[str, dict[str, Any]]:
    found = tables.read(tables.MEASUREMENTS, _REQUIRED, _SCHEMA)
    for field in dataclasses.fields(Cell):
        if field.name in found:  # the frame has both in one row
            path = tables.path_in_use(tables.MEASUREMENTS)
            raise tables.TableError(f"{path}: [{field.name}]: is a field of a cell")
    return {n: fields for n, fields in found.items() if not fields.get("derived")}


_TABLE = _read()
FIELDS: dict[str, Any] = {n: _TYPES[fields["type"]] for n, fields in _TABLE.items()}
"""The type of every number of a record by its name, in the order of the file."""
BYTES_OF_RANKS = tuple(
    name
    for name, fields in _TABLE.items()
    if fields["group"] in _OF_RANKS and fields.get("unit") == "bytes"
)
"""Bytes of which each rank of a cell has its own: a record has the largest."""


class Measurement:
    """The numbers of one cell as attributes. It cannot be changed after it was made.

    Raises:
        ValueError: there is no number of this name.
    """

    def __init__(self, **numbers: Any) -> None:
        for name in numbers:
            if name not in FIELDS:
                raise ValueError(f"unknown number {name!r}; {nearest(name, FIELDS)}")
        self.__dict__.update(dict.fromkeys(FIELDS) | numbers)

    def with_numbers(self, **numbers: Any) -> "Measurement":
        """Return a measurement that has these numbers in addition.

        Raises:
            ValueError: there is no number of this name.
        """
        return Measurement(**self.to_json() | numbers)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers by name, None for those that were not measured."""
        return dict(self.__dict__)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only if there is no such attribute.
        raise AttributeError(f"unknown number {name!r}; {nearest(name, FIELDS)}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set `{name}`: a measurement cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete `{name}`: a measurement cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measurement):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        known = {name: v for name, v in self.__dict__.items() if v is not None}
        return f"Measurement({', '.join(f'{n}={v!r}' for n, v in known.items())})"
