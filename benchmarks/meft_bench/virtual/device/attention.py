"""Choose the attention kernel that a GPU runs, and call its operator.

A CPU build of torch has no CUDA kernels to choose from and would use the `math`
implementation, which keeps every matrix of scores. This module makes the same choice as
torch (aten/native/transformers/cuda/sdp_utils.cpp, select_sdp_backend) and calls the
corresponding operator: the shapes of its outputs and of the tensors it saves are known
without a kernel.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends import cuda as switches
from torch.nn import functional
from torch.nn.attention import SDPBackend

from meft_bench.virtual.device.gpu import CONSUMER, Gpu

aten = torch.ops.aten

Attention = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Arguments of one call of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    """`query`, `key` and `value` have the shape `[batch, heads, tokens, width]`."""
    mask: Tensor | None
    """A float mask is added to the scores; a boolean mask is true where a score counts.
    """
    dropout: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.query.shape[-1]

    @property
    def is_half(self) -> bool:
        """Whether the tensors have a 16-bit floating-point dtype."""
        return self.query.dtype in (torch.float16, torch.bfloat16)

    @property
    def differentiates(self) -> bool:
        """Whether the kernel has to save tensors for backward."""
        tensors = (self.query, self.key, self.value, self.mask)
        requires = any(t.requires_grad for t in tensors if t is not None)
        return torch.is_grad_enabled() and requires

    @property
    def is_dense(self) -> bool:
        """Whether the last dimension of each tensor is contiguous."""
        mask = self.mask
        tensors = (self.query, self.key, self.value)
        return all(t.stride(-1) == 1 for t in tensors) and (
            mask is None or mask.stride(-1) == 1 or mask.shape[-1] == 1
        )


NAMES: dict[int, str] = {
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.MATH.value: "math",
}
"""Names of torch's backends, by their numbers."""


@contextlib.contextmanager
def priority_of(gpu: Gpu) -> Iterator[None]:
    """Let torch's order of backends be that of `gpu` while the context is active.

    torch sets it before its first call on a GPU, and `sdpa_kernel` changes it where
    `set_priority` is given.
    """
    numbers = {name: number for number, name in NAMES.items()}
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([numbers[name] for name in gpu.attention_order])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


def present_order() -> list[str]:
    """Return the names of torch's backends in the order in which it tries them."""
    order = torch._C._get_sdp_priority_order()
    return [NAMES[number] for number in order if number in NAMES]


def chosen(gpu: Gpu, call: Call, order: Iterable[str] = ()) -> str:
    """Return the kernel that `gpu` runs: `cudnn`, `flash`, `efficient` or `math`.

    Args:
        gpu: the GPU.
        call: the arguments of attention.
        order: the order in which kernels are tried; that of the GPU by default.

    Raises:
        RuntimeError: none of the enabled kernels supports the call.
    """
    if call.query.dim() != 4:
        return "math"
    for name in order or gpu.attention_order:
        if _FITS[name](gpu, call):
            return name
    raise RuntimeError("No available kernel. Aborting execution.")  # torch's message


def replacement(
    gpu: Gpu, device: str, plain: Attention, counts: dict[str, int]
) -> Attention:
    """Return a replacement for `scaled_dot_product_attention`.

    Calls with tensors of other devices are passed on to `plain`.

    Args:
        gpu: the GPU whose kernels are chosen.
        device: type of the device on which the tensors of the virtual GPU are.
        plain: torch's own function.
        counts: number of calls by name of the chosen kernel; updated in place.

    Returns:
        A function with the signature of `scaled_dot_product_attention`.
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
        if query.device.type != device:
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
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                attn_mask = attn_mask.to(dtype)
        call = Call(
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        name = chosen(gpu, call, present_order())
        counts[name] = counts.get(name, 0) + 1
        with torch.autocast(device, enabled=False):
            return _RUN[name](call)

    return attention


def _cudnn_fits(gpu: Gpu, call: Call) -> bool:
    hopper = gpu.compute_capability == (9, 0) and gpu.cudnn_version >= 91000
    widest = 256 if hopper else 128
    drops_wrongly = 91100 < gpu.cudnn_version < 91400
    widths = (call.width, call.value.shape[-1])
    return (
        switches.cudnn_sdp_enabled()
        and call.is_half
        and gpu.compute_capability >= (8, 0)
        and all(width <= widest and width % 8 == 0 for width in widths)
        and call.key.shape[2] != 1
        and not (call.dropout > 0 and (drops_wrongly or call.query.shape[2] == 1))
        and not (call.mask is not None and call.mask.requires_grad)
        and not _must_be_deterministic()
        and call.is_dense
    )


def _must_be_deterministic() -> bool:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warns


def _flash_fits(gpu: Gpu, call: Call) -> bool:
    width = call.width
    is_consumer = gpu.compute_capability in CONSUMER
    too_wide = width > 192 and (width <= 224 or call.dropout > 0)
    return (
        switches.flash_sdp_enabled()
        and call.is_half
        and gpu.compute_capability >= (8, 0)
        and call.mask is None
        and width == call.key.shape[-1] == call.value.shape[-1]
        and width <= 256
        and not (call.is_causal and call.query.shape[-2] != call.key.shape[-2])
        and not (call.differentiates and is_consumer and too_wide)
        and call.is_dense
    )


def _efficient_fits(gpu: Gpu, call: Call) -> bool:
    is_old = gpu.compute_capability < (8, 0)
    step = 8 if call.is_half else 1 if is_old else 4
    dtypes = [torch.float16, torch.float32, *([] if is_old else [torch.bfloat16])]
    return (
        switches.mem_efficient_sdp_enabled()
        and call.query.dtype in dtypes
        and call.width == call.key.shape[-1]
        and call.width % step == 0
        and call.value.shape[-1] % step == 0
        and call.query.shape[1] == call.key.shape[1]
        and call.is_dense
    )


def _math_fits(gpu: Gpu, call: Call) -> bool:
    return bool(switches.math_sdp_enabled())


def _cudnn(call: Call) -> Tensor:
    out: Tensor = aten._scaled_dot_product_cudnn_attention(
        *(call.query, call.key, call.value, _added(call)),
        *(call.differentiates, call.dropout, call.is_causal, False),
        scale=call.scale,
    )[0]
    return out


def _flash(call: Call) -> Tensor:
    width, tensors = call.width, [call.query, call.key, call.value]
    scale = 1 / math.sqrt(width) if call.scale is None else call.scale
    if width % 8:
        tensors = [functional.pad(t, (0, 8 - width % 8)) for t in tensors]
    out: Tensor = aten._scaled_dot_product_flash_attention(
        *tensors, call.dropout, call.is_causal, False, scale=scale
    )[0]
    return out[..., :width] if width % 8 else out


def _efficient(call: Call) -> Tensor:
    mask = _added(call)
    if mask is not None:
        length = mask.shape[-1]
        if length % 8:  # rows of the mask are aligned to 8 elements
            mask = functional.pad(mask, (0, 8 - length % 8))[..., :length]
        mask = mask.expand(*call.query.shape[:3], call.key.shape[2])
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        *(call.query, call.key, call.value, mask),
        *(call.differentiates, call.dropout, call.is_causal),
        scale=call.scale,
    )[0]
    return out


def _math(call: Call) -> Tensor:
    out: Tensor = torch._scaled_dot_product_attention_math(
        *(call.query, call.key, call.value, _added(call)),
        *(call.dropout, call.is_causal, None),
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )[0]
    return out


def _added(call: Call) -> Tensor | None:
    """Convert a boolean mask to one that is added to the scores."""
    mask, query = call.mask, call.query
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.full((), -math.inf, dtype=query.dtype, device=query.device)
    return torch.where(mask, 0.0, lowest)


_FITS: dict[str, Callable[[Gpu, Call], bool]] = {
    "cudnn": _cudnn_fits,
    "flash": _flash_fits,
    "efficient": _efficient_fits,
    "math": _math_fits,
}
_RUN: dict[str, Callable[[Call], Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}
