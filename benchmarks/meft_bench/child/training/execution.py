"""How a model's blocks are executed: which attention kernel, eager or compiled."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meft.backbone.find import find_blocks
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import ATTENTIONS
from meft_bench.shared.source import MissingError

_NO_KERNEL = (
    "No viable backend for scaled_dot_product_attention",
    "No available kernel",
)
"""torch's messages, on a CPU and on CUDA."""


@contextlib.contextmanager
def attention(cell: Cell) -> Iterator[None]:
    """Select the attention kernel of `cell`; all of the cell runs in this context.

    Raises:
        MissingError: torch has no such kernel for this device, or for these shapes.
    """
    backend = ATTENTIONS[cell.attention]
    if backend is None:
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_KERNEL):
                raise
            raise MissingError(
                f"attention {cell.attention!r}: torch has no such kernel for "
                f"{cell.device} at these shapes; take another, or `sdpa` for the best "
                "there is"
            ) from error


def compile_blocks(model: nn.Module, in_parts: bool) -> None:
    """Compile every module of every block, in place.

    All modules are compiled because a method may call any part of a block directly;
    inside a compiled module, the other modules are part of its graph.

    Args:
        model: the model.
        in_parts: whether blocks themselves will not be called, and are left out.
    """
    for found in find_blocks(model):
        for block in found.blocks:
            for module in block.modules():
                if module is not block or not in_parts:
                    module.compile()
