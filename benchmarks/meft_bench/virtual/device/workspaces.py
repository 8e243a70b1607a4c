"""Memory that CUDA kernels allocate internally, without a visible tensor.

The formulas were read from the kernels' host code and compared with an H200 (torch
2.11, cuDNN 9.19) by `meft-bench run gpu-check`. Each function returns bytes for the
arguments and outputs of one call of an operator.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from meft_bench.virtual.device.allocator import round_up
from meft_bench.virtual.device.gpu import Gpu

aten = torch.ops.aten
Workspace = Callable[[tuple[Any, ...], Any], int]
SORTED_FROM = 3072
"""Number of indices above which the gradient of an embedding sorts them first."""
MOST_THREADS = 512
"""Maximum number of threads of a block in a reduction."""
IN_REGISTERS = 128
"""Widest head whose outputs the memory-efficient kernel keeps in registers."""
LOCK_BYTES = 16
KEYS_OF_A_SPLIT = 64
LEAST_VALUES, MOST_VALUES = 16, 256
"""Number of values that a thread sums, where blocks share an output."""


def _flash_backward(args: tuple[Any, ...], out: Any) -> int:
    """Row sums, and the query's gradient in float32 (flash_api.cpp)."""
    batch, heads, tokens, width = args[1].shape
    rows, columns = round_up(tokens, 128), round_up(width, 32)
    columns = 256 if columns >= 224 else columns
    return int(4 * batch * heads * rows * (1 + columns)) + _shared_heads(args)


def _shared_heads(args: tuple[Any, ...]) -> int:
    """Gradients of keys and values for each query head that shares them."""
    query, key, value = args[1:4]
    if query.shape[1] == key.shape[1]:
        return 0
    widths = key.shape[-1] + value.shape[-1]
    rows = key.shape[0] * query.shape[1] * key.shape[2]
    return int(rows * widths * key.element_size())


def _efficient_forward(args: tuple[Any, ...], out: Any) -> int:
    """The output in float32, where it is 16-bit and too wide for registers."""
    attended = out[0]
    is_16_bit = attended.element_size() == 2
    wide = attended.shape[-1] > IN_REGISTERS
    return 4 * attended.numel() if is_16_bit and wide else 0


def _efficient_backward(args: tuple[Any, ...], out: Any) -> int:
    """Row sums, a contiguous copy of the output's gradient, and accumulators.

    The accumulators are float32 and exist for 16-bit inputs: of the query's gradient,
    in blocks that have a lock each, and where heads are too wide for registers of those
    of keys and values. For 32-bit floats, the row sums are not computed by the kernel:
    the product of the gradient and the output is a separate tensor.
    """
    gradient, query, key, value = args[:4]
    batch, heads, tokens, width = query.shape
    num_bytes = 4 * batch * heads * tokens
    if not gradient.transpose(1, 2).is_contiguous():
        num_bytes += gradient.numel() * gradient.element_size()
    if query.dtype == torch.float32:
        num_bytes += 4 * batch * heads * tokens * (width + 1)
        return int(num_bytes)
    rows = 64 if width <= 64 else 128
    columns = 128 if 64 < width <= IN_REGISTERS else 64
    num_blocks = -(-tokens // rows) * -(-width // columns)
    num_bytes += batch * heads * LOCK_BYTES * num_blocks
    num_bytes += 4 * batch * heads * round_up(tokens, 64) * round_up(width, 32)
    if width > IN_REGISTERS:
        num_splits = _num_splits(batch * heads, key.shape[2])
        widths = round_up(width, rows) + round_up(value.shape[-1], rows)
        num_bytes += 4 * batch * heads * num_splits * KEYS_OF_A_SPLIT * widths
    return int(num_bytes)


def _num_splits(num_heads: int, num_keys: int) -> int:
    """Return into how many parts the backward of wide heads splits its keys."""
    if num_heads >= 256 and num_keys <= 2 * KEYS_OF_A_SPLIT:
        return 1
    return max(min(-(-num_keys // KEYS_OF_A_SPLIT), 200 // num_heads), 1)


def _cudnn_backward(args: tuple[Any, ...], out: Any) -> int:
    """The query's gradient in float32, and row sums."""
    batch, heads, tokens, width = args[1].shape
    return int(4 * batch * heads * tokens * (width + 1)) + _shared_heads(args)


def _loss(args: tuple[Any, ...], out: Any) -> int:
    """The losses of all elements, before they are reduced (native/Loss.cpp)."""
    assert isinstance(out, Tensor)
    return out.untyped_storage().nbytes() if not out.dim() else 0


def _safe_softmax(args: tuple[Any, ...], out: Any) -> int:
    """A boolean mask of the masked scores, one byte each."""
    assert isinstance(out, Tensor)
    return out.numel()


def _softmax_backward(args: tuple[Any, ...], out: Any) -> int:
    """Product of the gradient and the output (SoftMax.cu)."""
    assert isinstance(out, Tensor)
    return out.numel() * out.element_size()


def _embedding_backward(args: tuple[Any, ...], out: Any) -> int:
    """Two sorts of 64-bit indices."""
    count = args[1].numel()
    return 0 if count <= SORTED_FROM else 4 * 8 * count


def _group_norm_backward(args: tuple[Any, ...], out: Any) -> int:
    """Sums in float32, three for each channel and two for each group.

    (group_norm_kernel.cu; compared with what others measured on a B200.)
    """
    rows, channels, groups = args[5], args[6], args[8]
    return 3 * round_up(4 * rows * channels, 512) + 2 * round_up(4 * rows * groups, 512)


def _sum(args: tuple[Any, ...], out: Any, gpu: Gpu) -> int:
    """Partial sums of a bias gradient: rows `[M, N]` summed over `M` (Reduce.cuh).

    Where there are few outputs and many rows, blocks of threads share an output, and
    each of their threads stores one partial sum.
    """
    rows, dims = args[0], args[1]
    over = {dim % rows.dim() for dim in dims or range(rows.dim())} if rows.dim() else ()
    if not over or over != set(range(len(over))) or len(over) == rows.dim():
        return 0  # whole warps reduce an output to one number
    if not rows.is_contiguous() or rows.numel() == 0:
        return 0
    num_outputs = math.prod(rows.shape[len(over) :])
    num_inputs = rows.numel() // num_outputs
    vector = next(size for size in (4, 2, 1) if rows.shape[-1] % size == 0)
    threads = MOST_THREADS // vector
    width = min(_power_of_2(num_outputs // vector, threads), 32)
    height = min(_power_of_2(num_inputs, threads), threads // width)
    width = min(_power_of_2(num_outputs // vector, threads), threads // height)
    if num_inputs < min(16 * height, MOST_VALUES):
        return 0
    values = -(-num_inputs // height)
    grid = -(-(num_outputs // vector) // width)
    blocks_per_multiprocessor = gpu.max_threads_per_multiprocessor // (width * height)
    most_blocks = gpu.num_multiprocessors * blocks_per_multiprocessor
    if values < MOST_VALUES or grid > most_blocks:
        return 0
    sharing = max(
        min(-(-most_blocks // grid), -(-values // LEAST_VALUES)),
        -(-values // MOST_VALUES),
    )
    if sharing <= 1:
        return 0
    accumulator = max(4, rows.element_size())  # sums of 16-bit floats are 32-bit floats
    num_bytes: int = accumulator * num_outputs * sharing * width * vector
    return num_bytes


def _power_of_2(value: int, most: int) -> int:
    """Return the largest power of two that exceeds neither `value` nor `most`."""
    return most if value >= most else 1 << max(value.bit_length() - 1, 0)


def of(gpu: Gpu) -> Mapping[Any, Workspace]:
    """Return the workspace functions for a GPU, by operator."""
    sums = functools.partial(_sum, gpu=gpu)
    return _OF_ALL | {aten.sum.dim_IntList: sums}


_OF_ALL: dict[Any, Workspace] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._safe_softmax.default: _safe_softmax,
    aten.mse_loss.default: _loss,
    aten.smooth_l1_loss.default: _loss,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
"""Workspace functions that apply to every GPU, by operator."""

MULTIPLY = frozenset(
    {
        *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm),
        *(aten.mv, aten.addmv, aten._addmm_activation),
    }
)
"""Operators for which cuBLAS keeps a workspace, one for each thread that runs them."""
WITH_BIAS = (aten.addmm, aten._addmm_activation)
"""Those operators of `MULTIPLY` that cuBLASLt runs, which keeps a workspace of its own.
"""
