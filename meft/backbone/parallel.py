"""Parallel adapters at a block's feed-forward that another method has added.

A block may hold a module named `parallel_adapter` with a method

    bind() -> function of the feed-forward's input, for the current batch

and, if other processes have some of its parameters, an attribute `is_divided`

Code that runs a block in halves passes its adapter through `with_parallel`, so that the
parallel adapter runs too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meft.backbone.layout import Adapter, begin

NAME = "parallel_adapter"
REBUILDS = "rebuilds_blocks"
"""Attribute that is True on a module that runs blocks in halves and recomputes them."""


def with_parallel(block: Any, adapter: Adapter | None = None) -> Adapter | None:
    """Return the sum of `adapter` and the parallel adapter; None without either."""
    carried = getattr(block, NAME, None)
    if carried is None:
        return adapter
    parallel: Adapter = carried.bind()
    return parallel if adapter is None else _Sum(adapter, parallel)


def is_divided(block: Any) -> bool:
    """Return whether a parallel adapter fetches parameters from other processes.

    All processes then have to run the block equally often.
    """
    return bool(getattr(getattr(block, NAME, None), "is_divided", False))


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum of two adapters on one input."""

    first: Adapter
    second: Adapter

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.begin(hidden)()

    def begin(self, hidden: Tensor) -> Callable[[], Tensor]:
        first, second = begin(self.first, hidden), begin(self.second, hidden)
        return lambda: first() + second()
