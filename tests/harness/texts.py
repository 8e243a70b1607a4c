"""The texts of the repository, and what they mention.

Texts are the documents and every string of the sources, docstrings and the fixed parts
of f-strings among them.
"""

import ast
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("meft", "benchmarks", "reports")
HISTORY = "CHANGELOG.md"
"""Speaks of names as they were."""


@functools.cache
def tracked() -> list[str]:
    """Every file of the repository, by its path in it."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others"]
    try:
        done = subprocess.run(
            [*command, "--exclude-standard"], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs a checkout and git", allow_module_level=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@functools.cache
def documents() -> dict[str, str]:
    """Documents and files of settings, by path."""
    kinds = {".md", ".toml", ".txt", ".ini"}
    names = [n for n in tracked() if Path(n).suffix in kinds or n == ".ci/run"]
    return {n: (ROOT / n).read_text() for n in names if n != HISTORY}


@functools.cache
def strings() -> dict[str, list[str]]:
    """The strings of every source, by path; a value in an f-string is a NUL."""
    found = {}
    for name in tracked():
        if name.endswith(".py") and name.startswith(PACKAGES):
            found[name] = list(_strings(ast.parse((ROOT / name).read_text())))
    return found


def _strings(tree: ast.AST) -> Iterator[str]:
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "\0"  # type: ignore[misc]
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in inside:
                yield node.value


def texts() -> Iterator[tuple[str, str]]:
    """Every text, with the file it is in."""
    yield from documents().items()
    for name, parts in strings().items():
        for part in parts:
            yield name, part


def mentions(pattern: str, suffix: str = "") -> dict[str, str]:
    """What a pattern finds in the texts, with a file that mentions it.

    Args:
        pattern: a regular expression.
        suffix: the end of the names of the files to look into.
    """
    found: dict[str, str] = {}
    for place, text in texts():
        if not place.endswith(suffix):
            continue
        for match in re.finditer(pattern, text):
            found.setdefault(match[0], place)
    return found


def unknown(found: dict[str, str], is_known: Callable[[str], bool]) -> list[str]:
    """Those mentioned that are not known, and where."""
    return [f"{name} in {place}" for name, place in found.items() if not is_known(name)]
