"""Numbers in a readable format. Bytes are converted to MiB and GiB only in this module.

Null is always an en dash, never 0 and never an empty cell.
"""

from typing import Any

import pandas as pd

NOTHING = "–"  # noqa: RUF001 (an en dash is what is meant)
MIB = 2**20


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
    return f"{size:.0f} B" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def format_bytes_spread(mean: Any, spread: Any) -> str:
    """Format `300.3 ± 0.1 MiB`, both in the unit of the mean; no spread is omitted."""
    text = format_bytes(mean)
    if is_null(mean) or is_null(spread) or not spread:
        return text
    number, unit = text.split(" ")
    size = {"B": 1, "KiB": 2**10, "MiB": MIB, "GiB": 2**30}[unit]
    return f"{number} ± {float(spread) / size:,.1f} {unit}"


def format_seconds(value: Any) -> str:
    """Format `0.0123` as `12.3 ms` and `75` as `1 min 15 s`."""
    if is_null(value):
        return NOTHING
    seconds = float(value)
    if abs(seconds) < 1:
        return f"{seconds * 1000:.3g} ms"
    if abs(seconds) < 60:
        return f"{seconds:.3g} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def format_count(value: Any) -> str:
    """Format `22713216` as `22,713,216`."""
    return NOTHING if is_null(value) else f"{int(value):,}"


def format_percent(value: Any) -> str:
    """Format the fraction `0.0123` as `1.23 %`."""
    return NOTHING if is_null(value) else f"{float(value) * 100:.3g} %"


def format_score(value: Any) -> str:
    """Format with three decimals, which is finer than the spread over seeds."""
    return NOTHING if is_null(value) else f"{float(value):.3f}"


def format_difference(value: Any) -> str:
    """Format a difference of scores: `0.0123` as `+0.012`."""
    return NOTHING if is_null(value) else f"{float(value):+.3f}"


def format_mean(mean: Any, spread: Any) -> str:
    """Format scores over seeds, `0.910 ± 0.014`; no spread is omitted."""
    text = format_score(mean)
    return text if is_null(spread) else f"{text} ± {format_score(spread)}"


def format_ratio(value: Any) -> str:
    """Format a ratio: `0.25342` as `0.253`."""
    return NOTHING if is_null(value) else f"{float(value):.3f}"


def format_error(value: Any) -> str:
    """Format a relative error, which may be any power of ten; NaN is not finite."""
    if isinstance(value, float) and value != value:
        return "not finite"
    return NOTHING if is_null(value) else f"{float(value):.1e}"


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
    return f"{float(value):.6g}" + (" s" if unit == "seconds" else "")


def format_fact(value: Any) -> str:
    """Format a fact of any type: `True` as `yes`."""
    if pd.api.types.is_bool(value):
        return "yes" if value else "no"
    return NOTHING if is_null(value) else str(value)
