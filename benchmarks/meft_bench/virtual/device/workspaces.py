"""Memory that CUDA kernels take for themselves, which no tensor shows.

Read from the kernels' host code and held against an H200 (torch 2.11, cuDNN 9.19), whose
figures `meft-bench run gpu-check` takes again. Each function gives bytes for the
arguments and outputs of one call of an operator.
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
    return int(4 * batch * heads * rows * (1 + columns)) + _shared_heads(args)


def _shared_heads(args: tuple[Any, ...]) -> int:
    """Gradients of keys and values for each head of queries that shares them."""
    query, key, value = args[1:4]
    if query.shape[1] == key.shape[1]:
        return 0
    widths = key.shape[-1] + value.shape[-1]
    rows = key.shape[0] * query.shape[1] * key.shape[2]
    return int(rows * widths * key.element_size())


def _efficient_backward(args: tuple[Any, ...], out: Any) -> int:
    """Row sums, the output's gradient without gaps, an accumulator of halves.

    Of 32-bit floats, the row sums are not the kernel's work: the gradient times the
    output is a tensor of its own.
    """
    gradient, query = args[0], args[1]
    batch, heads, tokens, width = query.shape
    num_bytes = 4 * batch * heads * tokens
    if not gradient.transpose(1, 2).is_contiguous():
        num_bytes += gradient.numel() * gradient.element_size()
    if query.dtype == torch.float32:
        num_bytes += 4 * batch * heads * tokens * (width + 1)
    else:
        num_bytes += 4 * batch * heads * round_up(tokens, 64) * round_up(width, 32)
    return int(num_bytes)


def _cudnn_backward(args: tuple[Any, ...], out: Any) -> int:
    """The query's gradient in float32, and row sums."""
    batch, heads, tokens, width = args[1].shape
    return int(4 * batch * heads * tokens * (width + 1)) + _shared_heads(args)


def _safe_softmax(args: tuple[Any, ...], out: Any) -> int:
    """Which entries have nothing to see."""
    assert isinstance(out, Tensor)
    return out.numel()


def _softmax_backward(args: tuple[Any, ...], out: Any) -> int:
    """The gradient times the output (SoftMax.cu)."""
    assert isinstance(out, Tensor)
    return out.numel() * out.element_size()


def _embedding_backward(args: tuple[Any, ...], out: Any) -> int:
    """Two sorts of 64-bit indices."""
    count = args[1].numel()
    return 0 if count <= SORTED_FROM else 4 * 8 * count


WORKSPACES: Mapping[Any, Workspace] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._safe_softmax.default: _safe_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}
"""By operator."""

MULTIPLY = (
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
    *(aten.mv.default, aten.addmv.default, aten._addmm_activation.default),
)
"""Operators for which cuBLAS keeps a workspace, one for each thread that runs them."""
WITH_BIAS = (aten.addmm.default, aten._addmm_activation.default)
"""Those of them that cuBLASLt runs, which keeps another."""
