"""Memory over one step by kind, from a file of moments of `meft-bench plan`.

A file has a line for every change of memory. A page shows at most `MOST_POINTS` of each
method: the step is cut into as many parts of equal length, and each is shown by its
moment of most memory, so the peak is always among them.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_reports.errors import RecordError
from meft_reports.files import read_whole
from meft_reports.text import SHORT_LENGTH, printable

MOST_POINTS = 200
MOST_METHODS = 12
FIRST = ("method", "time", "phase")
"""Columns of the file before those of the kinds."""
MOST_BYTES = 2**60


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Memory over one step of a method."""

    method: str
    kinds: tuple[str, ...]
    moments: tuple[tuple[int, str, tuple[int, ...]], ...]
    """Time (the number of the operator), phase, and the bytes of each kind."""

    def to_json(self) -> dict[str, Any]:
        """Return the timeline in the page's data."""
        return {
            "method": self.method,
            "kinds": self.kinds,
            "times": [time for time, _, _ in self.moments],
            "phases": [phase for _, phase, _ in self.moments],
            "bytes": [sizes for _, _, sizes in self.moments],
        }


def read_timelines(paths: Sequence[Path]) -> list[Timeline]:
    """Return the timelines of files of moments, one per method.

    Raises:
        RecordError: a file cannot be read, or is no file of moments.
    """
    found = []
    for path in paths:
        text = read_whole(path).decode("utf-8", "replace")
        try:
            lines = list(csv.reader(io.StringIO(text)))
        except csv.Error as error:
            raise RecordError(f"{path}: not a file of moments: {error}") from error
        found += _timelines(lines, path)
    if len(found) > MOST_METHODS:
        raise RecordError(
            f"{len(found)} timelines are too many for a page; give at most "
            f"{MOST_METHODS} methods"
        )
    return found


def _timelines(lines: Sequence[Sequence[str]], path: Path) -> list[Timeline]:
    header = lines[0] if lines else []
    if tuple(header[:3]) != FIRST or len(header) < 4:
        raise RecordError(
            f"{path}: not a file of moments, which `--timeline` of `meft-bench plan` "
            "writes"
        )
    kinds = tuple(printable(name, SHORT_LENGTH) for name in header[3:])
    moments: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            method, time, phase, *sizes = line
            numbers = tuple(map(int, sizes))
            moment = int(time), printable(phase, SHORT_LENGTH), numbers
            is_possible = all(0 <= size <= MOST_BYTES for size in numbers)
            if len(numbers) != len(kinds) or not is_possible:
                raise ValueError
        except ValueError as error:
            raise RecordError(f"{path}, line {number}: not a moment") from error
        moments.setdefault(printable(method, SHORT_LENGTH), []).append(moment)
    return [
        Timeline(method=method, kinds=kinds, moments=tuple(_thinned(its)))
        for method, its in moments.items()
    ]


def _thinned(
    moments: Sequence[tuple[int, str, tuple[int, ...]]],
) -> list[tuple[int, str, tuple[int, ...]]]:
    """Return the moment of most memory of each of `MOST_POINTS` parts of the step."""
    first, last = moments[0][0], moments[-1][0]
    length = max(1, last - first + 1)
    parts: dict[int, tuple[int, str, tuple[int, ...]]] = {}
    for moment in moments:
        part = (moment[0] - first) * MOST_POINTS // length
        if part not in parts or sum(moment[2]) > sum(parts[part][2]):
            parts[part] = moment
    return [parts[part] for part in sorted(parts)]
