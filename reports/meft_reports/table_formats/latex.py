r"""Tables as LaTeX: a `table` for each, with the rules of the package booktabs.

The preamble of a document that reads the file has to have `\usepackage{booktabs}`. The
title is the caption, notes are below the rows, and columns of numbers are aligned at
the right. Nothing in a cell is a command: `escaped` writes every character with a
meaning in LaTeX as that character. pdfLaTeX sets the symbols of `SYMBOLS`; names in
other scripts need LuaLaTeX or XeLaTeX, and a font that has them.
"""

import re
from collections.abc import Iterable, Sequence

from meft_reports.tables.table import Table

PREAMBLE = r"""% The preamble needs \usepackage{booktabs}.
% Names in other scripts than Latin need LuaLaTeX or XeLaTeX.
"""
MOST_FLOATS = 18
"""Number of tables in sequence that every LaTeX can hold before it places them."""
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedblright{}",
    # After the end of a row, these would be read as arguments of the line break.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""Characters with a meaning in LaTeX, and what prints them."""
SYMBOLS = {
    "–": r"\textendash{}",  # noqa: RUF001 (an en dash is what is meant)
    "—": r"\textemdash{}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",  # noqa: RUF001 (a multiplication sign is meant)
    "·": r"\textperiodcentered{}",
    "→": r"\ensuremath{\rightarrow}",
    "−": r"\ensuremath{-}",  # noqa: RUF001 (a minus sign is what is meant)
    "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    "…": r"\ldots{}",
}
"""Symbols of our own texts, in commands that every LaTeX has."""
_LIGATURE = re.compile(r"-(?=-)|'(?=')")
"""Characters that would become one dash or quotation mark with the next one."""
_CODE = re.compile(r"`([^`]*)`")


def to_bytes(tables: Sequence[Table]) -> bytes:
    """Return tables as a file of LaTeX."""
    parts = []
    for place, table in enumerate(tables):
        if place and place % MOST_FLOATS == 0:
            parts.append("\\clearpage\n")
        parts.append(_table(table))
    return (PREAMBLE + "\n".join(parts)).encode()


def _table(table: Table) -> str:
    num_numbers = len(table.header) - table.num_text_columns
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{escaped(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * table.num_text_columns}{'r' * num_numbers}}}",
        r"\toprule",
        _row(table.header),
        r"\midrule",
        *map(_row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip {{\footnotesize {_note(n)}\par}}" for n in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return rf"{' & '.join(map(escaped, cells))} \\"


def _note(note: str) -> str:
    """Return a note, which is our own text, with its code in a typewriter font."""
    parts = _CODE.split(note)  # text, code, text, ...
    return "".join(
        rf"\texttt{{{_replaced(part)}}}" if place % 2 else _replaced(part)
        for place, part in enumerate(parts)
    )


def escaped(text: str) -> str:
    """Return a text that LaTeX prints as it is, with single spaces."""
    return " ".join(_replaced(text).split())


def _replaced(text: str) -> str:
    known = SPECIAL | SYMBOLS
    shown = "".join(known.get(character, character) for character in text)
    return _LIGATURE.sub(r"\g<0>{}", shown)
