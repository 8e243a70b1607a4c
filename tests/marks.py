"""Which values of a test are for `--slow` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but_for(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values to test with, most of them only with `--slow`."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
