"""Which kernel of attention a GPU runs, and what it leaves in memory.

A CPU build of torch has no CUDA kernels to choose from and would take the `math` one,
which keeps every matrix of scores. The choice is made here as torch makes it
(aten/native/transformers/cuda/sdp_utils.cpp, select_sdp_backend), and the operator that
belongs to it is called: its outputs and what it keeps are known also without a kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda as switches
from torch.nn import functional

from meft_bench.virtual.gpu import Gpu

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
CONSUMER = ((8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs with less shared memory, where flash attention stops earlier."""

Attention = Callable[..., Tensor]


def chosen(
    gpu: Gpu,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
) -> str:
    """The kernel: `cudnn`, `flash`, `efficient` or `math`.

    Args:
        gpu: whose kernels.
        query: `[batch, heads, tokens, width]`, as are `key` and `value`.
        mask: added to the scores, or which of them count.
        dropout: of the scores.
        causal: no token sees a later one.
    """
    if query.dim() != 4:
        return "math"
    fits = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}
    for name in gpu.attention_order:
        if fits[name](gpu, query, key, value, mask, dropout, causal):
            return name
    return "math"


def replacement(gpu: Gpu, plain: Attention, counts: dict[str, int]) -> Attention:
    """What stands in for `scaled_dot_product_attention`; others than CUDA's go on.

    Args:
        gpu: whose kernels.
        plain: torch's own function.
        counts: how often each kernel was chosen; is added to.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            return plain(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask.to(dtype)
        name = chosen(gpu, query, key, value, attn_mask, dropout_p, is_causal)
        counts[name] = counts.get(name, 0) + 1
        tensors = (query, key, value, attn_mask)
        with torch.autocast("cuda", enabled=False):
            return _RUN[name](*tensors, dropout_p, is_causal, scale, enable_gqa)

    return attention


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the last dimension of each is without gaps."""
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return dense and (mask is None or mask.stride(-1) == 1 or mask.shape[-1] == 1)


def _cudnn(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    mask, dropout, _ = rest
    hopper = gpu.compute_capability == (9, 0) and gpu.cudnn_version >= 91000
    widest = 256 if hopper else 128
    drops_wrongly = 91100 < gpu.cudnn_version < 91400
    return (
        switches.cudnn_sdp_enabled()
        and q.dtype in HALF
        and gpu.compute_capability >= (8, 0)
        and all(t.shape[-1] <= widest and t.shape[-1] % 8 == 0 for t in (q, v))
        and k.shape[2] != 1
        and not (dropout > 0 and (drops_wrongly or q.shape[2] == 1))
        and _is_plain(q, k, v, mask)
    )


def _flash(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    mask, dropout, causal = rest
    width = q.shape[-1]
    too_wide = width > 192 and (width <= 224 or dropout > 0)
    return (
        switches.flash_sdp_enabled()
        and q.dtype in HALF
        and gpu.compute_capability >= (8, 0)
        and mask is None
        and width == k.shape[-1] == v.shape[-1]
        and width <= 256
        and not (causal and q.shape[-2] != k.shape[-2])
        and not (
            _differentiates(q, k, v) and gpu.compute_capability in CONSUMER and too_wide
        )
        and _is_plain(q, k, v, mask)
    )


def _efficient(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    mask = rest[0]
    step = 8 if q.dtype in HALF else 4
    return (
        switches.mem_efficient_sdp_enabled()
        and q.dtype in (*HALF, torch.float32)
        and q.shape[-1] == k.shape[-1]
        and q.shape[-1] % step == 0
        and v.shape[-1] % step == 0
        and q.shape[1] == k.shape[1]
        and _is_plain(q, k, v, mask)
    )


def _math(*_: Any) -> bool:
    return bool(switches.math_sdp_enabled())


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _run_cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    _: bool,
) -> Tensor:
    differentiates = _differentiates(q, k, v)
    out: Tensor = aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, differentiates, dropout, causal, False, scale=scale
    )[0]
    return out


def _run_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    _: bool,
) -> Tensor:
    width = q.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if width % 8:
        q, k, v = (functional.pad(t, (0, 8 - width % 8)) for t in (q, k, v))
    out: Tensor = aten._scaled_dot_product_flash_attention(
        q, k, v, dropout, causal, False, scale=scale
    )[0]
    return out[..., :width] if width % 8 else out


def _run_efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    _: bool,
) -> Tensor:
    differentiates = _differentiates(q, k, v)
    if mask is not None:
        mask = _as_added(mask, q)
        length = mask.shape[-1]
        if length % 8:  # rows of the mask begin at whole vectors
            mask = functional.pad(mask, (0, 8 - length % 8))[..., :length]
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, differentiates, dropout, causal, scale=scale
    )[0]
    return out


def _run_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    mask = None if mask is None else _as_added(mask, q)
    out: Tensor = torch._scaled_dot_product_attention_math(
        q, k, v, mask, dropout, causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


def _as_added(mask: Tensor, query: Tensor) -> Tensor:
    """Of a mask that tells which scores count, what is added to them."""
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.full((), -math.inf, dtype=query.dtype, device=query.device)
    return torch.where(mask, 0.0, lowest)


_RUN: dict[str, Callable[..., Tensor]] = {
    "cudnn": _run_cudnn,
    "flash": _run_flash,
    "efficient": _run_efficient,
    "math": _run_math,
}
