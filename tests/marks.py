"""Which values of a test are for `--slow` alone."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_for(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values to test with, most of them only with `--slow`.

    Args:
        values: the values of an argument, or tuples with one of each of several.
        kept: those that are fast.
    """

    def slow(value: Any) -> Any:
        each = value if isinstance(value, tuple) else (value,)
        return pytest.param(*each, marks=pytest.mark.slow)

    return [value if value in kept else slow(value) for value in values]


def pairs(**arguments: Iterable[Any]) -> pytest.MarkDecorator:
    """Test with every combination of values, most of them only with `--slow`.

    Few combinations suffice for every value of an argument to occur with every value of
    every other argument; these are the fast ones.

    Args:
        arguments: the values of each argument; a value may be the result of
            `slow_but_for`, and is then left out of the fast combinations.

    Returns:
        The mark that parametrizes the test.
    """
    columns = [list(values) for values in arguments.values()]
    rows = list(itertools.product(*columns))
    fast = [row for row in rows if not any(_is_slow(value) for value in row)]
    chosen = _covering([tuple(map(_value, row)) for row in fast])
    return pytest.mark.parametrize(
        list(arguments),
        [
            pytest.param(
                *values,
                marks=() if values in chosen and row in fast else pytest.mark.slow,
                id="-".join(str(getattr(value, "name", value)) for value in values),
            )
            for row in rows
            for values in [tuple(map(_value, row))]
        ],
    )


def _covering(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows in which each pair of values of two columns occurs that occurs in `rows`."""

    def found(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*map(found, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(found(row) & missing))
        chosen.append(best)
        missing -= found(best)
    return chosen


def _is_slow(value: Any) -> bool:
    return hasattr(value, "marks") and any(mark.name == "slow" for mark in value.marks)


def _value(value: Any) -> Any:
    return value.values[0] if hasattr(value, "marks") else value
