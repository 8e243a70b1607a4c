"""What the fields of a data file may hold: a schema names one `FieldKind` per field.

one_of(words)          one of these words
some_of(words)         a list of these words
values_of(types)       a table of names with values of their types
object_in(folder)      `FILE:NAME`, where FILE is a module in a folder
"""

import ast
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldKind:
    """What a field may hold."""

    words: str
    """What it should be, as an error message says it."""
    fits: Callable[[Any], bool]
    """Returns whether a value of TOML is of this kind."""


def one_of(words: Collection[str]) -> FieldKind:
    """Return the kind of a field that holds one of `words`."""
    return FieldKind(
        f"one of {', '.join(words)}", lambda v: isinstance(v, str) and v in words
    )


def some_of(words: Collection[str]) -> FieldKind:
    """Return the kind of a field that holds a list of `words`, which may be empty."""
    return FieldKind(
        f"a list of {', '.join(words)}",
        lambda v: (
            isinstance(v, list) and all(isinstance(w, str) and w in words for w in v)
        ),
    )


def values_of(types: Mapping[str, Any]) -> FieldKind:
    """Return the kind of a table that has values for some of the names in `types`."""
    return FieldKind(
        f"a table with values of {', '.join(types)}",
        lambda v: (
            isinstance(v, dict) and all(type(v[name]) is types.get(name) for name in v)
        ),
    )


def object_in(folder: Path) -> FieldKind:
    """Return the kind of a field that holds `FILE:NAME`, FILE a module in `folder`."""
    files = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")

    def fits(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        file, _, name = value.partition(":")
        return file in files and name in _names_in(folder / f"{file}.py")

    words = f"FILE:NAME, a NAME that is defined in a FILE of {', '.join(files)}"
    return FieldKind(words, fits)


@functools.cache
def _names_in(file: Path) -> frozenset[str]:
    """Return the names that a module defines, without running it."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign():
                inside = (one for target in node.targets for one in ast.walk(target))
                found |= {one.id for one in inside if isinstance(one, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return frozenset(found)


TEXT = FieldKind("a string", lambda v: isinstance(v, str))
FLAG = FieldKind("true or false", lambda v: isinstance(v, bool))
NUMBER = FieldKind(
    "a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)
)
TABLES = FieldKind(
    "a table of tables",
    lambda v: isinstance(v, dict) and all(isinstance(w, dict) for w in v.values()),
)
COLOR = FieldKind(
    'a color such as "#0072B2"',
    lambda v: isinstance(v, str) and bool(re.fullmatch("#[0-9A-Fa-f]{6}", v)),
)
TABLE_NAME = FieldKind("the name of a table of this file", lambda v: isinstance(v, str))
"""The reader of the file checks in addition that it has a table of this name."""
