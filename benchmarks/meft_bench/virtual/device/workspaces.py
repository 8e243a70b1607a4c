"""Memory that CUDA kernels take for themselves, which no tensor shows.

Read from the kernels' host code; cuDNN's is a guess until it has been measured. Each
function gives bytes for the arguments and outputs of one call of an operator.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from meft_bench.virtual.device.allocator import round_up

aten = torch.ops.aten
Workspace = Callable[[tuple[Any, ...], Any], int]
SORTED_FROM = 3072
"""From more indices on, the gradient of an embedding sorts them first."""


def _flash_backward(args: tuple[Any, ...], out: Any) -> int:
    """Row sums, and the query's gradient in float32 (flash_api.cpp)."""
    batch, heads, tokens, width = args[1].shape
    rows, columns = round_up(tokens, 128), round_up(width, 32)
    columns = 256 if columns >= 224 else columns
    return int(4 * batch * heads * rows * (1 + columns))


def _efficient_backward(args: tuple[Any, ...], out: Any) -> int:
    """Row sums, the output's gradient without gaps, an accumulator of halves."""
    gradient, query = args[0], args[1]
    batch, heads, tokens, width = query.shape
    num_bytes = 4 * batch * heads * tokens
    if not gradient.transpose(1, 2).is_contiguous():
        num_bytes += gradient.numel() * gradient.element_size()
    if query.dtype != torch.float32:
        num_bytes += 4 * batch * heads * round_up(tokens, 64) * round_up(width, 32)
    return int(num_bytes)


def _cudnn_backward(args: tuple[Any, ...], out: Any) -> int:
    """A guess: the query's gradient in float32, and two row sums."""
    batch, heads, tokens, width = args[1].shape
    return int(4 * batch * heads * tokens * (width + 2))


def _safe_softmax(args: tuple[Any, ...], out: Any) -> int:
    """The plain softmax, and which rows have nothing to see."""
    assert isinstance(out, Tensor)
    return out.numel() * (out.element_size() + 1)


def _embedding_backward(args: tuple[Any, ...], out: Any) -> int:
    """Two sorts of 64-bit indices."""
    count = args[1].numel()
    return 0 if count <= SORTED_FROM else 4 * 8 * count


WORKSPACES: Mapping[Any, Workspace] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._safe_softmax.default: _safe_softmax,
    aten.embedding_dense_backward.default: _embedding_backward,
}
"""By operator."""
