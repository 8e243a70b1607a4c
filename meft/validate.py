"""What configs ask of their fields; each raises `ConfigError` with what to do."""

import difflib
from collections.abc import Iterable

from meft.errors import ConfigError


def one_of(name: str, value: str, valid: Iterable[str]) -> None:
    """`value` is one of `valid`."""
    names = list(valid)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"`{name}` must be one of {names}, got {value!r}{hint}")


def at_least(name: str, value: int, least: int) -> None:
    """`value` is `least` or more."""
    if value < least:
        raise ConfigError(f"`{name}` must be at least {least}, got {value}")
