"""Replace a function also in modules that have imported it by its name."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock


def everywhere(
    plain: Any, name: str, replacement: Any
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of a function, one for each module that has it.

    Args:
        plain: the function.
        name: its name; by another name it is not found.
        replacement: what is there instead.
    """
    for module in [*sys.modules.values()]:
        if getattr(module, "__dict__", {}).get(name) is plain:
            yield mock.patch.object(module, name, replacement)
