"""The allowed difference of a column: `0`, `20%`, `5MiB`, `0.01`.

    threshold = number [unit] ["@" pattern]
    number    = digits ["." digits] ["e" sign digits]
    unit      = "%"  of the expected value's size
              | "B" | "KiB" | "MiB" | "GiB", for columns in bytes
    (no unit) = in the column's own unit: bytes, seconds, a count, a score
    pattern   = cells whose id matches, with `*` and `?`; without one, all cells

Numbers are exact fractions, so that one byte more than allowed is detected at any size;
a score in a record is the decimal number that is written there.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from meft_reports.columns import find_measured
from meft_reports.columns.column import Column
from meft_reports.errors import ReportError

SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Two digits of exponent: a fraction of 10**99999 would need too much memory.
PATTERN = re.compile(
    r"(\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?)\s?(%|B|KiB|MiB|GiB)?", re.ASCII
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """The difference that is allowed in one column."""

    column: Column
    amount: Fraction
    """In the column's unit, or a share of the expected value if `relative`."""
    relative: bool
    pattern: str = "*"
    """Which cells it applies to, by their ids."""

    def allowed(self, expected: Fraction) -> Fraction:
        """Return the largest allowed difference from `expected`, in its unit."""
        return self.amount * abs(expected) if self.relative else self.amount


def thresholds_of(
    cell_id: str, thresholds: Sequence[Threshold]
) -> dict[str, Threshold]:
    """Return the threshold of each column for a cell: the last one that matches it."""
    return {
        threshold.column.name: threshold
        for threshold in thresholds
        if fnmatch.fnmatchcase(cell_id, threshold.pattern)
    }


def parse_threshold(text: str) -> Threshold:
    """Parse `COLUMN:THRESHOLD[@PATTERN]`, e.g. `peak_allocated:5MiB@sparse*`.

    Raises:
        ReportError: not of that form, or a size for a column that is not in bytes.
        UnknownName: no column has this name.
    """
    name, colon, limit = text.partition(":")
    limit, at, pattern = limit.partition("@")
    if at and not pattern:
        raise ReportError(f"{text!r}: no pattern of cells follows the @")
    if not colon:
        raise ReportError(f"{text!r}: expected COLUMN:THRESHOLD, as in saved:5MiB")
    column = find_measured(name)
    match = PATTERN.fullmatch(limit)
    if match is None:
        raise ReportError(
            f"{text!r}: {limit!r} is not a threshold; expected a number, a share "
            "(20%) or a size (5KiB, 5MiB, 1GiB)"
        )
    number, unit = match.groups()
    if unit in SIZES and column.unit != "bytes":
        raise ReportError(
            f"{text!r}: {column.name} is not in bytes; expected a number or a share"
        )
    scale = Fraction(1, 100) if unit == "%" else Fraction(SIZES.get(unit, 1))
    return Threshold(
        column=column,
        amount=Fraction(number) * scale,
        relative=unit == "%",
        pattern=pattern or "*",
    )
