"""Parallel adapters at a block's feed-forward that another method has added.

A block may hold a module named `parallel_adapter` with one method:

    bind() -> function of the feed-forward's input, for the current batch

Code that runs a block in halves passes its adapter through `with_parallel`, so that the
parallel adapter runs too.
"""

from typing import Any

from meft.backbone.layout import Adapter

NAME = "parallel_adapter"
REBUILDS = "rebuilds_blocks"
"""Attribute that is True on a module that runs blocks in halves and recomputes them."""


def with_parallel(block: Any, adapter: Adapter | None = None) -> Adapter | None:
    """Return the sum of `adapter` and the parallel adapter; None without either."""
    carried = getattr(block, NAME, None)
    if carried is None:
        return adapter
    parallel: Adapter = carried.bind()
    if adapter is None:
        return parallel
    return lambda hidden: adapter(hidden) + parallel(hidden)
