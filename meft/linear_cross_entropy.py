"""Linear layer and cross-entropy in one, without the logits of a whole batch.

For rows h_t of `hidden`, labels y_t and a divisor n,

    loss = 1/n sum_t (logsumexp(z_t) - z_t[y_t]),    z_t = W h_t + b

and its gradient for the logits needs nothing but the logits:

    dz_t = 1/n (softmax(z_t) - onehot(y_t))
    dh_t = W^T dz_t,    dW = sum_t dz_t h_t^T

So the forward takes a chunk of tokens, computes its logits, its part of the loss and at
once its part of the gradients, and lets the logits go before it takes the next chunk.
The backward only multiplies by the incoming gradient. Nothing is computed twice: the
matrix products are those of ordinary autograd, some of them earlier.

`plain_linear_cross_entropy` is the twin, and the reference of the tests. A kernel from
elsewhere has its adapter below. There is no label smoothing and there are no class
weights; no vector of losses, one per token, because its backward would have to wait for
the incoming gradients; no second derivative.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from meft.bottleneck import wide_dtype
from meft.errors import ConfigError, UnsupportedCallError
from meft.transforms import refuse_create_graph

IGNORE_INDEX = -100
"""The label of tokens that have no part in the loss, as in torch and transformers."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    num_items: Tensor | int | float | None = None,
    chunk_tokens: int = 1024,
) -> Float[Tensor, ""]:
    """The cross-entropy of `hidden weight^T + bias`, chunk by chunk.

    Logits are computed in the dtype of `hidden`, under autocast in that of autocast;
    softmax, loss and sums in float32, for float64 in float64. With a single chunk loss
    and gradients are the plain twin's, bit for bit, but for two that are finer here:
    those in float16, where the twin's underflow sooner, and a bias's under autocast.

    At most `chunk_tokens * vocab * 12` bytes are alive for logits (24 in float64). Kept
    for backward: `tokens * hidden` in the dtype of `hidden`; and `vocab * hidden * 4`
    bytes (8 in float64) if, and only if, `weight` wants a gradient. Under autocast the
    weight's cast is alive during the forward.

    Args:
        hidden: a row per token.
        weight: a row per class.
        labels: a class per token, int64.
        bias: of the logits.
        ignore_index: the label of tokens to leave out. If all are left out, gradients
            are 0, and the loss is not-a-number unless `num_items` is given.
        num_items: the sum over tokens is divided by this, 1 for the sum itself; None
            for the number of labels that are not left out, which makes it the mean.
        chunk_tokens: rows of logits that exist at a time, at least 1.

    Returns:
        The loss. What is not finite in logits that have a part in it reaches it.
    """
    if not torch.is_grad_enabled():
        # Only so does the autograd function hear that nobody wants a gradient.
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, ignore_index, num_items, chunk_tokens
    )
    return loss


def plain_linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    num_items: Tensor | int | float | None = None,
) -> Float[Tensor, ""]:
    """The same under ordinary autograd, with all logits at once."""
    logits = functional.linear(hidden, weight, bias)
    logits = logits.to(wide_dtype(logits.dtype))
    if num_items is None:
        return functional.cross_entropy(logits, labels, ignore_index=ignore_index)
    total = functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction="sum"
    )
    return total / num_items


def liger_linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, " tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    num_items: Tensor | int | float | None = None,
) -> Float[Tensor, ""]:
    """The same by the fused Triton kernels of `liger-kernel`, CUDA only.

    It chooses its chunks itself. The tests of this project run without a GPU: they
    check how it is called, not what it computes.

    Raises:
        ConfigError: `liger-kernel` is not installed.
        UnsupportedCallError: not on CUDA; or `weight` wants a gradient and `hidden`
            does not.
    """
    liger = import_liger()
    if not hidden.is_cuda:
        raise UnsupportedCallError(
            f"`liger-kernel` runs on CUDA, got hidden states on {hidden.device}: move "
            "the model, or choose `backend='torch'`"
        )
    if weight.requires_grad and not hidden.requires_grad and torch.is_grad_enabled():
        raise UnsupportedCallError(
            "`liger-kernel` gives the weight of a head no gradient unless its input "
            "wants one as well: choose `backend='torch'`"
        )
    total: Tensor = liger(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items is None else "sum",
    )
    return total if num_items is None else total / num_items


def import_liger() -> Callable[..., Tensor]:
    """The function of `liger-kernel`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from liger_kernel.transformers.functional import (
            liger_fused_linear_cross_entropy,
        )
    except ImportError as error:
        raise ConfigError(
            "`backend='liger'` needs the package `liger-kernel` and a CUDA device: "
            "`pip install 'meft[liger]'`, or choose `backend='torch'`, which needs "
            f"neither ({error})"
        ) from None
    found: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    """The autograd function; its idea is in the module's docstring.

    Note: [The divisor comes in two halves]

    A loss scaler multiplies the loss to keep float16 gradients out of the subnormals,
    but here the gradients were taken before it could. So 1/n is split into a mantissa
    and a power of two: the logits' gradients are taken with the mantissa, at a size
    that float16 can hold, and the backward multiplies by the power of two together with
    the incoming gradient, in float32. Powers of two are exact, so no other dtype sees a
    difference.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        num_items: Tensor | int | float | None,
        chunk_tokens: int,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        kind = hidden.device.type
        compute = hidden.dtype
        if torch.is_autocast_enabled(kind) and compute != torch.float64:
            compute = torch.get_autocast_dtype(kind)
            weight = weight.to(compute)
            bias = None if bias is None else bias.to(compute)
        wide = wide_dtype(compute)

        kept = labels != ignore_index
        items = kept.sum() if num_items is None else num_items
        items = torch.as_tensor(items, dtype=wide, device=hidden.device)
        mantissa, exponent = torch.frexp(1 / items)
        # With no items the mantissa is infinite and the exponent may be anything.
        exponent = exponent.where(mantissa.isfinite(), 0)
        share = torch.where(kept, mantissa, 0)

        loss = items.new_zeros(())
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        d_bias = items.new_zeros(len(weight)) if wants_bias else None
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                inputs = hidden[chunk].to(compute)
                logits = functional.linear(inputs, weight, bias).to(wide)
                log_p = functional.log_softmax(logits, dim=-1)
                del logits
                loss += functional.nll_loss(
                    log_p, labels[chunk], ignore_index=ignore_index, reduction="sum"
                )
                dz = (
                    _gradient(log_p, labels[chunk], share[chunk]).to(compute)
                    if any(ctx.needs_input_grad)
                    else None
                )
                del log_p
                if dz is None:
                    continue
                if d_hidden is not None:
                    d_hidden[chunk] = dz @ weight
                if d_weight is not None:
                    _add_product_(d_weight, dz, inputs)
                if d_bias is not None:
                    d_bias += dz.sum(0, dtype=wide)
                del dz
        power = torch.ldexp(torch.ones_like(loss), exponent)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, power)
        return loss / items

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("a chunked loss", "Call `meft.unchunk_loss(model)` first")
        *products, power = ctx.saved_tensors
        factor = gradient * power
        # In the dtype of the loss, because the factor alone may be out of the range of
        # float16.
        scaled = (
            None if d is None else (d.to(factor.dtype) * factor).to(dtype)
            for d, dtype in zip(products, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _gradient(
    log_p: Float[Tensor, "chunk vocab"],
    labels: Int[Tensor, " chunk"],
    share: Float[Tensor, " chunk"],
) -> Float[Tensor, "chunk vocab"]:
    """dz, with `share` for 1/n, which is 0 for ignored tokens."""
    d_log_p = torch.zeros_like(log_p)
    rows = torch.arange(len(log_p), device=log_p.device)
    d_log_p[rows, labels.where(share != 0, 0)] = -share
    # What autograd itself calls, and so the same bits. A graph for autograd would pass
    # the logits to whoever counts or offloads saved tensors.
    dz: Tensor = torch.ops.aten._log_softmax_backward_data(
        d_log_p, log_p, 1, log_p.dtype
    )
    return dz


def _add_product_(
    d_weight: Float[Tensor, "vocab hidden"],
    dz: Float[Tensor, "chunk vocab"],
    inputs: Float[Tensor, "chunk hidden"],
) -> None:
    """Add a chunk's dW, dz^T inputs."""
    if dz.dtype == torch.bfloat16:
        d_weight += dz.t() @ inputs
    else:
        # Float16 as well: the sum over tokens could overflow before any loss scaler
        # had a say.
        d_weight.addmm_(dz.t().to(d_weight.dtype), inputs.to(d_weight.dtype))
