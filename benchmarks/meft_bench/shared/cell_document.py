"""The page docs/fields.md, written from the fields of a cell and their descriptions.

`python -m meft_bench.shared.cell_document docs/fields.md` writes it.
"""

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from meft_bench.shared import methods, registry
from meft_bench.shared.cell import Cell

HEAD = """\
# Fields of a cell

A cell of a sweep has these fields; this page is written from `meft_bench.shared.cell`.
Every field but `method` has a default, and any of them can be in `defaults`, `axes`,
`zip` or `set` of a matrix, or be given to `meft-bench plan` by `--set NAME=VALUE`. A
record has all of them.

| field | default | meaning | methods |
|---|---|---|---|
"""
OF_ALL = "all"
PLACES = {"METHODS": "`benchmarks/methods.toml`", "TASKS": "[tasks.md](tasks.md)"}
"""Where the names of long tables are."""
_NAMES = re.compile(r"`meft_bench\.shared\.registry\.(\w+)`")
MOST_NAMES = 4
"""Number of methods that a row names."""


def text() -> str:
    """Return the page."""
    return HEAD + "".join(map(_row, dataclasses.fields(Cell)))


def _row(field: "dataclasses.Field[object]") -> str:
    is_given = field.default is not dataclasses.MISSING
    default = f"`{field.default!r}`".replace("'", '"') if is_given else ""
    meaning = _NAMES.sub(_names, _descriptions()[field.name]).replace("|", "\\|")
    return f"| `{field.name}` | {default} | {meaning} | {_methods(field.name)} |\n"


def _names(found: "re.Match[str]") -> str:
    """Return the names of a table of `registry`, or where they are."""
    names = getattr(registry, found[1])
    place = PLACES.get(found[1])
    return place or ", ".join(f"`{name}`" for name in names)


def _methods(name: str) -> str:
    """Return the methods that use a field; some fields are for a few only."""
    users = [n for n, method in methods.TABLE.items() if name in method.options]
    if not users:
        return OF_ALL
    shown = ", ".join(f"`{user}`" for user in users[:MOST_NAMES])
    rest = len(users) - MOST_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown


def _descriptions() -> dict[str, str]:
    """Return the text below each field, on one line."""
    (tree,) = ast.parse(inspect.getsource(Cell)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
