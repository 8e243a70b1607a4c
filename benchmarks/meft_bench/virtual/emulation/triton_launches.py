"""Launches of Triton kernels, which do nothing on a virtual GPU.

A kernel writes into tensors that its caller has made, and allocates nothing. What
Triton allocates to measure the candidates of an autotuned kernel is not counted.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock


def left_out() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of Triton, if it is installed."""
    if importlib.util.find_spec("triton") is None:
        return
    for module, name in (
        ("triton.runtime.jit", "JITFunction"),
        ("triton.runtime.autotuner", "Autotuner"),
        ("triton.runtime.autotuner", "Heuristics"),
    ):
        kind = getattr(importlib.import_module(module), name)
        yield mock.patch.object(kind, "run", _nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
