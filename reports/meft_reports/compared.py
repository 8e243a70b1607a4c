"""The number of a column that `check` compares, and how it is written.

A column of numbers is compared as it is, a column of lists by its worst entry: the
greatest where lower is better, else the least. An entry that is not finite is worse
than any number.
"""

import math
from fractions import Fraction
from typing import Any

from meft_reports.columns.column import Column
from meft_reports.format import format_value, is_null

Number = int | float


def compared_number(column: Column, value: Any) -> Number | None:
    """Return the number of `value` that is compared.

    Args:
        column: one of `meft_reports.columns.MEASURED`.
        value: of this column, from a record or from the frame. An entry of a list that
            was not finite is None or NaN.

    Returns:
        None where nothing was measured; NaN where an entry is not finite.
    """
    if column.dtype == "list":
        return _worst_entry(column, value)
    if is_null(value):
        return None
    return int(value) if column.dtype == "Int64" else float(value)


def _worst_entry(column: Column, entries: Any) -> Number | None:
    if not isinstance(entries, list) or not entries:
        return None
    numbers = [math.nan if entry is None else float(entry) for entry in entries]
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return max(numbers) if column.lower_is_better else min(numbers)


def exact(number: Number) -> Fraction:
    """Return a finite number as the fraction that its shortest decimal text is.

    A record holds 0.49, a threshold 0.01: as decimals they are exactly what is written,
    while the floats nearest to them differ from 0.5 and from each other by a little
    more or less.
    """
    return Fraction(repr(number))


def format_number(column: Column, number: Number | None) -> str:
    """Return a number of `compared_number` as text, in the unit of its column."""
    if number is not None and not math.isfinite(number):
        return "not finite"
    return format_value(number, column.unit)
