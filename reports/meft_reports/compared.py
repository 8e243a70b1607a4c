"""The number of a column that `check` compares, and its format.

A column of numbers is compared directly, a column of lists by its worst entry: the
maximum where lower is better, else the minimum. An entry that is not finite is worse
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
        value: a value of this column, from a record or from the frame. An entry of a
            list that was not finite is None or NaN.

    Returns:
        The number; None where nothing was measured; NaN where an entry is not finite.
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
    """Return a finite number as the fraction of its shortest decimal text.

    A record holds 0.49, a threshold 0.01: as decimals their sum is exactly 0.5, while
    the nearest floats are slightly larger or smaller than the decimals.
    """
    return Fraction(repr(number))


def format_number(column: Column, number: Number | None) -> str:
    """Return a number of `compared_number` as text, in the unit of its column."""
    if number is not None and not math.isfinite(number):
        return "not finite"
    return format_value(number, column.unit)
