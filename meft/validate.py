"""Validation of the fields of a config.

A config has a table with the expectation for each of its fields. `check_fields`
replaces each value by what the expectation returns: the same value as a plain `str`,
`int`, `float`, `bool` or `tuple`. An illegal value raises `ConfigError`, whose message
contains the given value and what is expected. `suggests_fields` handles misspelt names
of arguments.
"""

import difflib
import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from meft.errors import ConfigError

Config = TypeVar("Config")
Expectation = Callable[[str, Any], Any]
"""Function of (name, value) that returns the value or raises `ConfigError`."""


def suggests_fields(kind: type[Config]) -> type[Config]:
    """Make a dataclass suggest the nearest field for a misspelt keyword argument.

    A class decorator, above `@dataclass`. The signature does not change.

    Args:
        kind: the dataclass, all of whose arguments are keyword arguments.

    Returns:
        `kind` itself, which raises TypeError as before, with another message.
    """
    plain: Callable[..., None] = kind.__init__
    valid = list(inspect.signature(kind).parameters)

    @wraps(plain)
    def __init__(self: Config, /, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in valid:
                hint = _nearest(name, valid) or f"; expected one of {valid}"
                raise TypeError(f"{kind.__name__} has no field {name!r}{hint}")
        plain(self, *args, **fields)

    kind.__init__ = __init__  # type: ignore[method-assign,assignment]
    return kind


def check_fields(config: object, expectations: Mapping[str, Expectation]) -> None:
    """Check every field of a frozen dataclass, and convert its values to plain types.

    Args:
        config: the instance, in its `__post_init__`.
        expectations: the expectation of each field, by name.

    Raises:
        ConfigError: the first illegal value.
    """
    for name, expected in expectations.items():
        object.__setattr__(config, name, expected(name, getattr(config, name)))


def checked(
    fields: Mapping[str, Any], expectations: Mapping[str, Expectation]
) -> dict[str, Any]:
    """Return fields that were read from a file, checked and converted to plain types.

    Args:
        fields: the value of each field, by name.
        expectations: the expectation of each field, by name.

    Returns:
        What the expectations return, by name.

    Raises:
        ConfigError: a field is unknown or missing, or the first illegal value.
    """
    for name in fields:
        if name not in expectations:
            raise ConfigError(
                f"there is no field `{name}`{_nearest(name, expectations)}"
            )
    for name in expectations:
        if name not in fields:
            raise ConfigError(f"the field `{name}` is missing")
    return {
        name: expected(name, fields[name]) for name, expected in expectations.items()
    }


def one_of(valid: Iterable[str]) -> Expectation:
    """Expect one of some strings."""
    return partial(_one_of, list(valid))


def integer(least: int, most: int | None = None) -> Expectation:
    """Expect an integer of any type that Python accepts as an index, except bool."""
    return partial(_integer, least, most)


def boolean(name: str, value: Any) -> bool:
    """Return `value` as a bool if it is True or False, of Python or numpy."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"`{name}` must be True or False, got {_given(value)}")
    return bool(value)


def path(name: str, value: Any) -> str:
    """Return `value` as an absolute path, if it is a path that is not empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"`{name}` must be a path, got {_given(value)}")
    return str(Path(os.fsdecode(value)).expanduser().absolute())


def nonzero_number(name: str, value: Any) -> float:
    """Return `value` as a float if it is a finite real number other than 0."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not math.isfinite(value) or value == 0:
        raise ConfigError(
            f"`{name}` must be a finite number other than 0, got {_given(value)}"
        )
    return float(value)


def or_none(expected: Expectation) -> Expectation:
    """Expect None, or what `expected` accepts."""
    return partial(_or_none, expected)


def _one_of(valid: list[str], name: str, value: Any) -> str:
    if isinstance(value, str) and value in valid:
        return valid[valid.index(value)]
    hint = _nearest(str(value), valid)
    raise ConfigError(f"`{name}` must be one of {valid}, got {_given(value)}{hint}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message that suggests the nearest valid name."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _integer(least: int, most: int | None, name: str, value: Any) -> int:
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        plain = operator.index(value)
    except TypeError:
        raise ConfigError(
            f"`{name}` must be an integer, {bounds}, got {_given(value)}"
        ) from None
    if plain < least or (most is not None and plain > most):
        raise ConfigError(f"`{name}` must be {bounds}, got {plain}")
    return plain


def _or_none(expected: Expectation, name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return expected(name, value)
    except ConfigError as error:
        raise ConfigError(f"{error} (None is allowed as well)") from None


def _given(value: Any) -> str:
    """Return the value as text, with its type where the value does not show it."""
    if value is None or isinstance(value, str | bool):
        return repr(value)
    return f"{value!r} of type {type(value).__name__}"
