"""Write the tables of docs/numbers.md from the definitions of the columns.

Each group of `measurements.toml` has one table there, between two comments:

    <!-- numbers: memory -->
    ...
    <!-- end -->

`python -m meft_reports.numbers docs/numbers.md` replaces what is between them.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meft_reports.errors import ReportError, UnknownName
from meft_reports.files import write_atomically

if TYPE_CHECKING:
    from meft_reports.columns.column import Column


def update(text: str) -> str:
    """Return a document with its tables of numbers replaced.

    Args:
        text: the document, in Markdown.

    Raises:
        ReportError: a group has no place in the document, a place has no such group, or
            `measurements.toml` is wrong.
    """
    # Imported here, as a wrong data file is an error of the import.
    from meft_reports.columns import COLUMNS

    groups: dict[str, list[Column]] = {}
    for column in COLUMNS:
        if column.group:
            groups.setdefault(column.group, []).append(column)
    found = []

    def replace(match: re.Match[str]) -> str:
        group = match[1]
        if group not in groups:
            raise UnknownName("group", group, groups)
        found.append(group)
        return f"<!-- numbers: {group} -->\n{_table(groups[group])}<!-- end -->"

    text = re.sub(
        r"<!-- numbers: (.*?) -->.*?<!-- end -->", replace, text, flags=re.DOTALL
    )
    for group in groups:
        if found.count(group) != 1:
            raise ReportError(
                f"group {group!r} should have one table, has {found.count(group)}: "
                f"write `<!-- numbers: {group} -->` and `<!-- end -->` on two lines"
            )
    return text


def _table(columns: "Sequence[Column]") -> str:
    rows = [f"| `{c.name}` | {c.meaning} | {c.how} |\n" for c in columns]
    # Markdown ends a table at an empty line, and begins one after an empty line.
    return "\n| column | meaning | how |\n|---|---|---|\n" + "".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Update the documents that the command names; return the exit code."""
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name)
        try:
            write_atomically(path, update(path.read_text(encoding="utf-8")).encode())
        except (ReportError, OSError, UnicodeDecodeError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
