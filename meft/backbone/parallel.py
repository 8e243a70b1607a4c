"""What stands beside a block's feed-forward, put there by another method.

A block may carry a module as `parallel_adapter`, with one method:

    bind() -> function of the feed-forward's input, for the batch in the works

`beside` joins it to the adapter that a caller brings along, so that whoever takes a
block apart into halves runs it too.
"""

from typing import Any

from meft.backbone.family import Adapter

NAME = "parallel_adapter"
REBUILDS = "rebuilds_blocks"
"""Attribute, true of a module that runs blocks in halves and runs them again."""


def beside(block: Any, adapter: Adapter | None = None) -> Adapter | None:
    """`adapter` and what the block itself carries, as one; None if there is neither."""
    carried = getattr(block, NAME, None)
    if carried is None:
        return adapter
    parallel: Adapter = carried.bind()
    if adapter is None:
        return parallel
    return lambda hidden: adapter(hidden) + parallel(hidden)
