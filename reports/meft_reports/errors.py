"""Our exceptions, all for the person who can put the mistake right.

ReportError            one line to print; the command line exits 2
├── RecordError        a file of records that cannot be read
├── UnknownName        a column, plot or table that does not exist
└── NothingToDraw      the frame holds nothing for this plot; says what it would need
    └── NothingDeclared  nor was any of its cells asked for, so nothing is missing
"""

import difflib
from collections.abc import Iterable


class ReportError(Exception):
    """What was got, what was expected, what to do: one line."""


class RecordError(ReportError):
    """A file of records that cannot be read; names the file and the line."""


class UnknownName(ReportError):
    """A name that is not in the list it should be in; names the nearest one that is."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        """`kind` says what was named: `column`, `plot`, `table`."""
        names = sorted(valid)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}valid: {', '.join(names)}")


class NothingToDraw(ReportError):
    """The frame holds nothing for this plot; says what it would need."""


class NothingDeclared(NothingToDraw):
    """No cell of the run, however it ended, is of the kind that this plot shows."""
