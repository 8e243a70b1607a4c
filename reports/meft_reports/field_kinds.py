"""What the fields of a data file may hold: a schema names one `FieldKind` per field.

one_of(words)          one of these words
some_of(words)         a list of these words
ANY                    anything, in a field that only the harness reads
"""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
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


ANY = FieldKind("anything", lambda v: True)
TEXT = FieldKind("a string", lambda v: isinstance(v, str))
FLAG = FieldKind("true or false", lambda v: isinstance(v, bool))
NUMBER = FieldKind(
    "a finite number", lambda v: type(v) in (int, float) and math.isfinite(v)
)
COLOR = FieldKind(
    'a color such as "#0072B2"',
    lambda v: isinstance(v, str) and bool(re.fullmatch("#[0-9A-Fa-f]{6}", v)),
)
TABLE_NAME = FieldKind("the name of a table of this file", lambda v: isinstance(v, str))
"""The reader of the file checks in addition that it has a table of this name."""
