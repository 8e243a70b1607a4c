"""Exceptions of this package, with messages for the user who can correct the error.

ReportError            one line to print; the command line exits 2
├── RecordError        a file of records that cannot be read
├── UnknownName        a column, plot or table that does not exist
└── NothingToDraw      the frame has no data for this plot; states what it requires
    └── NothingDeclared  the run has no such cells, so nothing is missing
"""

import difflib
from collections.abc import Iterable


class ReportError(Exception):
    """Raised with one line: the value, what was expected, and what to do."""


class RecordError(ReportError):
    """Raised if a file of records cannot be read; names the file and the line."""


class UnknownName(ReportError):
    """Raised for a name that is not in its list; names the nearest one that is."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        """Make the error.

        Args:
            kind: what was named: `column`, `plot`, `table`.
            name: the unknown name.
            valid: all valid names.
        """
        names = sorted(valid)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}valid: {', '.join(names)}")


class NothingToDraw(ReportError):
    """Raised if the frame has no data for this plot; states what it requires."""


class NothingDeclared(NothingToDraw):
    """Raised if no cell of the run, with any status, is of the kind this plot shows."""
