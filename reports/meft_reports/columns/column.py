"""`Column`: the properties of one column, independent of any record."""

from dataclasses import dataclass
from typing import Literal, get_args

Section = Literal["", "cell", "measurement", "environment", "versions", "derived"]
Dtype = Literal["string", "Int64", "Float64", "boolean", "list"]
Unit = Literal[
    "", "bytes", "seconds", "joules", "watts", "megahertz", "count", "fraction"
]
UNITS = tuple(unit for unit in get_args(Unit) if unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """The properties of one column, independent of any record."""

    name: str
    section: Section
    """Part of the record that holds the value; "" for its top level."""
    dtype: Dtype
    """pandas nullable dtype; `list` holds lists of floats in an object column."""
    unit: Unit = ""
    has_lines: bool = False
    """Whether a text keeps its line breaks."""
    is_predicted: bool = False
    """Whether it is always computed from a model of a GPU, and never measured."""
    is_shared: bool = False
    """Whether other processes on the same GPU change it."""
    lower_is_better: bool | None = None
    """None where neither direction is an improvement."""
    greatest: float | None = None
    """Maximum of the values; None if there is no bound.

    The minimum of columns with a unit is 0.
    """
    required: bool = False
    """Whether a record without a value is rejected."""
    default: str | float | None = None
    """Value for older records that lack the field."""
    meaning: str
    group: str = ""
    """Section of docs/numbers.md whose table has this column; "" if none has."""
    how: str = ""
    """How a column with a group is measured."""

    @property
    def key(self) -> str:
        """The name of the value inside its section."""
        return self.name.removesuffix("_version") if self.versioned else self.name

    @property
    def versioned(self) -> bool:
        """Whether the value is one entry of the environment's `versions`."""
        return self.section == "versions"

    @property
    def short_name(self) -> str:
        """The name without its unit: `peak_allocated` for `peak_allocated_bytes`."""
        return self.name.removesuffix("_bytes")

    @property
    def is_measured_time(self) -> bool:
        """Whether it is a time that a clock measured, which has noise."""
        return self.unit == "seconds" and not self.is_predicted

    @property
    def comparable(self) -> bool:
        """Whether `check` can compare it: a number, or a list with a better direction.

        For a list, the worst entry is compared.
        """
        if self.section not in ("measurement", "derived"):
            return False
        if self.dtype == "list":
            return self.lower_is_better is not None
        return self.dtype in ("Int64", "Float64")


def top(name: str, dtype: Dtype, meaning: str, unit: Unit = "") -> Column:
    """Define a field of the record itself.

    Args:
        name: name of the column.
        dtype: its dtype.
        meaning: its description.
        unit: its unit.
    """
    return Column(
        name=name, section="", dtype=dtype, unit=unit, required=True, meaning=meaning
    )


def later_top(name: str, meaning: str, has_lines: bool = False) -> Column:
    """Define a text of the record itself that older records lack.

    Args:
        name: name of the column.
        meaning: its description.
        has_lines: whether the text keeps its line breaks.
    """
    return Column(
        name=name, section="", dtype="string", meaning=meaning, has_lines=has_lines
    )


def cell(name: str, dtype: Dtype, meaning: str, unit: Unit = "") -> Column:
    """Define a field of the cell that every record has.

    Args:
        name: name of the column.
        dtype: its dtype.
        meaning: its description.
        unit: its unit.
    """
    return Column(
        name=name,
        section="cell",
        dtype=dtype,
        unit=unit,
        required=True,
        meaning=meaning,
    )


def later_cell(
    name: str,
    dtype: Dtype,
    meaning: str,
    default: str | float,
    unit: Unit = "",
    greatest: float | None = None,
) -> Column:
    """Define a field of the cell that older records lack.

    Args:
        name: name of the column.
        dtype: its dtype.
        meaning: its description.
        default: value for records without the field.
        unit: its unit.
        greatest: maximum of its values; None if there is no bound.
    """
    return Column(
        name=name,
        section="cell",
        dtype=dtype,
        unit=unit,
        default=default,
        greatest=greatest,
        meaning=meaning,
    )


def where(name: str, dtype: Dtype, meaning: str, required: bool = False) -> Column:
    """Define a field of the environment.

    Args:
        name: name of the column.
        dtype: its dtype.
        meaning: its description.
        required: whether a record without a value is rejected.
    """
    return Column(
        name=name,
        section="environment",
        dtype=dtype,
        required=required,
        meaning=meaning,
    )


def version(package: str) -> Column:
    """Define the version of a package."""
    return Column(
        name=f"{package}_version",
        section="versions",
        dtype="string",
        meaning=f"version of {package}",
    )


def derived(name: str, dtype: Dtype, meaning: str) -> Column:
    """Define a column of the record that is computed from other columns.

    Args:
        name: name of the column.
        dtype: its dtype.
        meaning: its description.
    """
    return Column(name=name, section="derived", dtype=dtype, meaning=meaning)
