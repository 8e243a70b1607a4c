"""Tables as GitHub Markdown."""

from collections.abc import Iterable, Sequence

from meft_reports.tables.table import Table

MARKUP = frozenset("\\|<>`*[]!$&~")
"""Characters with a meaning in Markdown within a line.

`_` is not included, because it has none within a word.
"""


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of Markdown."""
    return to_markdown(tables).encode()


def to_markdown(tables: Sequence[Table]) -> str:
    """Return tables as Markdown, each with a heading and its notes."""
    return "\n".join(map(_table, tables))


def _table(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    rules = [
        "---" if index < table.num_text_columns else "---:"
        for index in range(len(table.header))
    ]
    lines = [f"### {_escaped(table.title)}", ""]
    lines += [line(table.header), f"| {' | '.join(rules)} |"]
    lines += [line(row) for row in table.rows]
    # Notes are our own text, with code in backticks.
    lines += [f"\n{_escaped(note, MARKUP - {'`'})}" for note in table.notes]
    return "\n".join(lines) + "\n"


def _escaped(text: str, markup: frozenset[str] = MARKUP) -> str:
    """Escape text for Markdown, so that it is no markup, link, image or formula."""
    escaped = "".join(f"\\{c}" if c in markup else c for c in text)
    return " ".join(escaped.split())
