"""Load an object of a user's code: `python:MODULE:NAME` or `python:FILE.py:NAME`.

A FILE is one module, which may import what is installed, and nothing next to it.
"""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from meft_bench.shared.registry import nearest


def load(place: str, what: str) -> Any:
    """Return the object at `PREFIX:MODULE:NAME` or `PREFIX:FILE.py:NAME`.

    Args:
        place: the place.
        what: what the object is, for messages.

    Raises:
        ValueError: its module cannot be imported, or has no callable of that name.
    """
    where, _, name = place.partition(":")[2].rpartition(":")
    module = import_module(where, what)
    found = getattr(module, name, None)
    if not callable(found):
        has = "no" if found is None else "something that cannot be called as"
        names = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
        raise ValueError(
            f"{what} {place!r}: {where} has {has} {name!r}; {nearest(name, names)}"
        )
    return found


@functools.cache
def import_module(where: str, what: str) -> ModuleType:
    """Import a module of the user, by its name or its file.

    Raises:
        ValueError: it cannot be imported; the message has the type of the error.
    """
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        name = f"_own_{Path(where).stem}"
        spec = importlib.util.spec_from_file_location(name, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except Exception as error:  # of any type, in code of the user
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what}: {where} cannot be imported: {reason}") from error
    return module
