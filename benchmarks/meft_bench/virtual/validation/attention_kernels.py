"""Attention kernels: which one runs, what it saves for backward, and its workspaces.

Every case runs twice, and the second run is reported. Peaks are relative to the bytes
allocated when the forward, or the backward, began.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from meft_bench.virtual.device import attention
from meft_bench.virtual.validation.place import CheckFigure, Place

BATCH, HEADS, TOKENS = 4, 16, 1024
GROUPS = 4
"""Number of key and value heads where queries share them."""
WIDTHS = (64, 128, 256)
MASKS = ("none", "causal", "bool", "bool-causal", "float")
"""Masks of the cases, in this order.

No mask; `is_causal`; padding that is equal for all queries, as in BERT; padding and
causal combined, as in decoders; the same, added to the scores.
"""
FORCED = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield kernels and bytes of every case."""
    for dtype, width, mask, dropout, grouped in itertools.product(
        ("bf16", "fp32"), WIDTHS, MASKS, (0.0, 0.1), (False, True)
    ):
        name = f"{dtype} width {width} mask {mask} dropout {dropout}"
        name += " grouped" if grouped else ""
        yield from _case(place, name, dtype, width, mask, dropout, grouped, None)


def kernel_figures(place: Place) -> Iterator[CheckFigure]:
    """Yield the same for each kernel if only it is enabled, and for other lengths."""
    for kernel, width, dropout, mask in itertools.product(
        FORCED, WIDTHS, (0.0, 0.1), ("none", "causal", "bool-causal")
    ):
        name = f"only {kernel} bf16 width {width} mask {mask} dropout {dropout}"
        yield from _case(place, name, "bf16", width, mask, dropout, False, kernel)
    for tokens in (100, 512, 2048):  # 100 is no multiple of a kernel's tile
        for mask in ("none", "causal", "bool"):
            name = f"bf16 width 64 mask {mask} tokens {tokens}"
            yield from _case(
                place, name, "bf16", 64, mask, 0.0, False, None, tokens=tokens
            )


def _case(
    place: Place,
    name: str,
    dtype: str,
    width: int,
    mask: str,
    dropout: float,
    grouped: bool,
    kernel: str | None,
    tokens: int = TOKENS,
) -> Iterator[CheckFigure]:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    heads = GROUPS if grouped else HEADS

    def rows(num_heads: int) -> Tensor:
        # As in models: a projection is split into heads, and the axes are swapped.
        whole = torch.randn(
            BATCH, tokens, num_heads, width, device=place.device, dtype=kind
        )
        return whole.requires_grad_().transpose(1, 2)

    with place.fresh(), _only(kernel):
        query, key, value = rows(HEADS), rows(heads), rows(heads)
        named = {
            "attn_mask": _mask(mask, tokens, kind, place.device),
            "dropout_p": dropout,
            "is_causal": mask == "causal",
            "enable_gqa": grouped,
        }
        gradient = torch.randn_like(query)
        try:
            chosen = _chosen(place, query, key, value, named)
        except RuntimeError:  # none of the enabled kernels supports the call
            chosen = "none"
        yield CheckFigure(case=name, quantity="kernel", value=chosen)
        try:
            _run(query, key, value, named, gradient)
            found = _run(query, key, value, named, gradient)
        except (RuntimeError, NotImplementedError) as error:
            if kernel is None:
                raise
            first = str(error).splitlines()[0]
            yield CheckFigure(case=name, quantity="refusal", value=first[:80])
            return
    for quantity, num_bytes in found.items():
        yield CheckFigure(case=name, quantity=quantity, value=num_bytes)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    named: Mapping[str, Any],
    gradient: Tensor,
) -> dict[str, int]:
    """Return the bytes of a forward and a backward."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = functional.scaled_dot_product_attention(query, key, value, **named)
    kept = torch.cuda.memory_allocated()
    forward_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(out, (query, key, value), gradient)
    backward_peak = torch.cuda.max_memory_allocated()
    del out, gradients
    return {
        "kept_bytes": kept - held,
        "forward_peak_bytes": forward_peak - held,
        "backward_peak_bytes": backward_peak - kept,
    }


def _mask(name: str, tokens: int, dtype: torch.dtype, device: str) -> Tensor | None:
    if name in ("none", "causal"):
        return None
    real = torch.ones(BATCH, 1, 1, tokens, dtype=torch.bool, device=device)
    if name == "bool":
        return real.expand(BATCH, 1, tokens, tokens)
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    both = real & lower
    if name == "bool-causal":
        return both
    lowest = torch.finfo(dtype).min
    return torch.zeros(both.shape, dtype=dtype, device=device).masked_fill_(
        ~both, lowest
    )


def _only(kernel: str | None) -> contextlib.AbstractContextManager[object]:
    if kernel is None:
        return contextlib.nullcontext()
    return sdpa_kernel(getattr(SDPBackend, kernel))


def _chosen(
    place: Place, query: Tensor, key: Tensor, value: Tensor, named: Mapping[str, Any]
) -> str:
    if place.virtual is None:
        number = torch._fused_sdp_choice(query, key, value, scale=None, **named)
        return KERNELS.get(number, "none")
    call = attention.Call(
        query=query,
        key=key,
        value=value,
        mask=named["attn_mask"],
        dropout=named["dropout_p"],
        is_causal=named["is_causal"],
        scale=None,
        enable_gqa=named["enable_gqa"],
    )
    return attention.chosen(place.virtual.gpu, call)
