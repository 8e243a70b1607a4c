"""The tables of `docs/what-works.md` name tests and messages that exist."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "what-works.md"


class Row(NamedTuple):
    what: str
    result: str
    test: str


def rows() -> list[Row]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    # A pipe inside a cell is escaped, as Markdown asks.
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line[:1] == "|"]
    stripped = [[cell.strip() for cell in row] for row in cells]
    return [Row(*row) for row in stripped if row[0] != "what" and set(row[0]) != {"-"}]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_every_row_names_a_test_that_exists(row: Row) -> None:
    """A row whose test was renamed or removed would claim what nothing shows."""
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", row.test)
    assert names, f"no `file.py::test` in {row.test!r}"
    for file, test in names:
        assert test in _functions(ROOT / "tests" / file), f"{file} has no {test}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_every_refusal_quotes_a_message_of_the_library(row: Row) -> None:
    """What a row quotes is what the user will read; `…` skips over values."""
    if row.result.startswith("works"):
        return
    quoted = re.match(r"refused: `(\w+)`: “(.+)”", row.result)
    assert quoted, f"neither 'works' nor 'refused: `Error`: “message”': {row.result!r}"
    parts = [part.strip() for part in quoted[2].replace("\\|", "|").split("…")]
    pattern = ".*".join(re.escape(part) for part in parts)
    assert any(re.search(pattern, text, re.DOTALL) for text in _texts()), quoted[2]


@cache
def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@cache
def _texts() -> list[str]:
    """The string literals of the library; an f-string without its values."""
    texts = []
    for path in sorted((ROOT / "meft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                ]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
