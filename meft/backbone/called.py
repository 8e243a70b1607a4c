"""Blocks that are run by a call of the block, because code is attached to it.

The halves of a family call the modules inside a block. A block with hooks, with
parameters that FSDP2 gathers when it is called, or that is compiled, has to be called
itself: once in a forward, and once in a recompute, as under gradient checkpointing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_local = threading.local()
"""Blocks that a stack is calling in this thread."""


def is_sharded(block: nn.Module) -> bool:
    """Return whether FSDP2 shards parameters of a block, or of a module inside.

    Names are compared, as importing FSDP takes a second.
    """
    kinds = (kind.__name__ for m in block.modules() for kind in type(m).__mro__)
    return "FSDPModule" in kinds


def call_block(
    block: nn.Module,
    hidden: Tensor,
    call: Mapping[str, Any],
    function: Callable[..., Tensor] | None = None,
) -> Any:
    """Call a block and return what it returns.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        call: its other arguments, by name.
        function: what to run in place of the block's own forward, with the same
            arguments.
    """
    with allowed(block), in_place_of_forward(block, function):
        return block(hidden, **call)


def is_called_by_a_stack(block: nn.Module) -> bool:
    """Return whether `call_block` is calling a block in this thread."""
    return block in getattr(_local, "blocks", ())


@contextlib.contextmanager
def allowed(block: nn.Module) -> Iterator[None]:
    """Run the body with calls of a block by its stack."""
    before = getattr(_local, "blocks", ())
    _local.blocks = (*before, block)
    try:
        yield
    finally:
        _local.blocks = before


@contextlib.contextmanager
def in_place_of_forward(
    block: nn.Module, function: Callable[..., Any] | None
) -> Iterator[None]:
    """Run the body with a function in the place of the forward of a module, if any."""
    if function is None:
        yield
        return
    attributes = vars(block)
    attributes["forward"] = function
    try:
        yield
    finally:
        del attributes["forward"]
