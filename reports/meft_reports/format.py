"""Numbers in a readable format. Bytes are converted to MiB and GiB only in this module.

Null is always an en dash, never 0 and never an empty cell. A formatted number is a
`ShownNumber`: text, which keeps the number and its unit for formats that hold numbers.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import pandas as pd

NOTHING = "–"  # noqa: RUF001 (an en dash is what is meant)
MIB = 2**20
SYMBOLS = {"seconds": " s", "joules": " J", "watts": " W", "megahertz": " MHz"}
"""What follows a number in text, by its unit."""


class ShownNumber(str):
    """A number as text, which keeps the number itself and its unit.

    Joined with other text it becomes a `str`, so that words around a number do not pass
    for the number.
    """

    values: dict[str, float]
    """The number under "", and by name what the text states beside it: `spread`, `low`,
    `high`."""
    unit: str
    """Unit of `values`: `bytes`, `seconds`, `count`, `fraction`, or "" for none."""

    def __new__(cls, text: str, unit: str, value: Any, **beside: Any) -> Self:
        """Make a text of a number.

        Args:
            text: the number as shown.
            unit: its unit.
            value: the number, which may be null where only `beside` is known.
            beside: further numbers of the same unit by name; nulls are left out.
        """
        shown = super().__new__(cls, text)
        every = {"": value, **beside}
        known = {n: float(v) for n, v in every.items() if not is_null(v)}
        shown.values = {n: v for n, v in known.items() if math.isfinite(v)}
        shown.unit = unit
        return shown


def with_words(number: str, words: Sequence[str]) -> str:
    """Return a formatted number and words, separated by commas; it keeps its value.

    Args:
        number: a formatted number, which is left out if it is a dash and there are
            words.
        words: what to add.
    """
    shown = ", ".join([*([] if number == NOTHING else [number]), *words])
    if not words or not isinstance(number, ShownNumber):
        return number if not words else shown
    found = ShownNumber(shown, number.unit, None)
    found.values = dict(number.values)
    return found


def is_null(value: Any) -> bool:
    """Return whether a scalar of the frame is null (None, NA or NaN)."""
    return bool(pd.isna(value))


def format_bytes(value: Any) -> str:
    """Format `1536` as `1.5 KiB`.

    The unit is the largest of B, KiB, MiB, GiB in which the rounded number is at least
    1.
    """
    if is_null(value):
        return NOTHING
    size, units = float(value), ["B", "KiB", "MiB", "GiB"]
    # One digit after the point is shown, so 1023.96 KiB is 1.0 MiB.
    while abs(round(size, 1)) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    text = f"{size:.0f} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"
    return ShownNumber(text, "bytes", value)


def format_bytes_spread(mean: Any, spread: Any) -> str:
    """Format `300.3 ± 0.1 MiB`, both in the unit of the mean; no spread is omitted."""
    text = format_bytes(mean)
    if is_null(mean) or is_null(spread) or not spread:
        return text
    number, unit = text.split(" ")
    size = {"B": 1, "KiB": 2**10, "MiB": MIB, "GiB": 2**30}[unit]
    shown = f"{number} ± {float(spread) / size:,.1f} {unit}"
    return ShownNumber(shown, "bytes", mean, spread=spread)


def format_seconds(value: Any) -> str:
    """Format `0.0123` as `12.3 ms` and `75` as `1 min 15 s`."""
    if is_null(value):
        return NOTHING
    seconds = float(value)
    if abs(seconds) < 1:
        text = f"{seconds * 1000:.3g} ms"
    elif abs(seconds) < 60:
        text = f"{seconds:.3g} s"
    else:
        text = f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return ShownNumber(text, "seconds", seconds)


def format_count(value: Any) -> str:
    """Format `22713216` as `22,713,216`."""
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{int(value):,}", "count", int(value))


def format_part(part: int, whole: int) -> str:
    """Format a count of a whole: `3 of 1,024`."""
    return ShownNumber(f"{part:,} of {whole:,}", "count", part, of=whole)


def format_percent(value: Any) -> str:
    """Format the fraction `0.0123` as `1.23 %`."""
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{float(value) * 100:.3g} %", "fraction", value)


def format_share(value: float, digits: str) -> str:
    """Format a fraction as a percentage with given digits: `-0.0123` as `-1.23 %`.

    Args:
        value: the fraction.
        digits: format of the percentage, such as `+.2f`.
    """
    return ShownNumber(f"{100 * value:{digits}} %", "fraction", value)


def format_score(value: Any) -> str:
    """Format with three decimals, which is finer than the spread over seeds."""
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{float(value):.3f}", "", value)


def format_difference(value: Any) -> str:
    """Format a difference of scores: `0.0123` as `+0.012`."""
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{float(value):+.3f}", "", value)


def format_mean(mean: Any, spread: Any) -> str:
    """Format scores over seeds, `0.910 ± 0.014`; no spread is omitted."""
    text = format_score(mean)
    if is_null(mean) or is_null(spread):
        return text
    return ShownNumber(f"{text} ± {format_score(spread)}", "", mean, spread=spread)


def format_ratio(value: Any) -> str:
    """Format a ratio: `0.25342` as `0.253`."""
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{float(value):.3f}", "", value)


def format_error(value: Any) -> str:
    """Format a relative error, which may be any power of ten; NaN is not finite."""
    if isinstance(value, float) and value != value:
        return "not finite"
    if is_null(value):
        return NOTHING
    return ShownNumber(f"{float(value):.1e}", "", value)


def format_text(value: Any) -> str:
    """Return text unchanged."""
    return NOTHING if is_null(value) or value == "" else str(value)


def format_value(value: Any, unit: str) -> str:
    """Format a value exactly, by the unit of its column, for findings."""
    if is_null(value):
        return "null"
    if unit == "bytes":
        return f"{int(value):,} bytes ({format_bytes(value)})"
    if unit == "count":
        return format_count(value)
    return f"{float(value):.6g}{SYMBOLS.get(unit, '')}"


def format_fact(value: Any) -> str:
    """Format a fact of any type: `True` as `yes`."""
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    return NOTHING if is_null(value) else str(value)
