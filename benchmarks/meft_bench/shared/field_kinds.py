"""What the fields of a data file may hold: a schema names one `Kind` per field.

one_of(words)          one of these words
some_of(words)         a list of these words
object_in(folder)      `FILE:NAME`, where FILE is a module in a folder
"""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold."""

    words: str
    """What it should be, as an error message says it."""
    fits: Callable[[Any], bool]
    """Returns whether a value of TOML is of this kind."""


def one_of(words: Collection[str]) -> Kind:
    """Return the kind of a field that holds one of `words`."""
    return Kind(
        f"one of {', '.join(words)}", lambda v: isinstance(v, str) and v in words
    )


def some_of(words: Collection[str]) -> Kind:
    """Return the kind of a field that holds a list of `words`, which may be empty."""
    return Kind(
        f"a list of {', '.join(words)}",
        lambda v: (
            isinstance(v, list) and all(isinstance(w, str) and w in words for w in v)
        ),
    )


def object_in(folder: Path) -> Kind:
    """Return the kind of a field that holds `FILE:NAME`, FILE a module in `folder`."""
    files = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")

    def fits(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        file, _, name = value.partition(":")
        return file in files and name.isidentifier()

    return Kind(f"FILE:NAME, with a FILE of {', '.join(files)}", fits)


TEXT = Kind("a string", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind("a finite number", lambda v: type(v) in (int, float) and math.isfinite(v))
TABLES = Kind(
    "a table of tables",
    lambda v: isinstance(v, dict) and all(isinstance(w, dict) for w in v.values()),
)
COLOR = Kind(
    'a color such as "#0072B2"',
    lambda v: isinstance(v, str) and bool(re.fullmatch("#[0-9A-Fa-f]{6}", v)),
)
TABLE_NAME = Kind("the name of a table of this file", lambda v: isinstance(v, str))
"""The reader of the file checks in addition that it has a table of this name."""
