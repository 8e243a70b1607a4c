"""A linear layer and cross-entropy in one function, without all logits at once.

For rows h_t of `hidden`, labels y_t and a divisor n,

    loss = 1/n sum_t (logsumexp(z_t) - z_t[y_t]),    z_t = W h_t + b

and its gradient with respect to the logits depends on the logits only:

    dz_t = 1/n (softmax(z_t) - onehot(y_t))
    dh_t = W^T dz_t,    dW = sum_t dz_t h_t^T

The forward therefore processes chunks of tokens. For each chunk it computes the logits,
their part of the loss and, at the same time, their part of the gradients, and frees the
logits before the next chunk. The backward only multiplies by the incoming gradient.
Nothing is computed twice: the matrix products are those of ordinary autograd, some of
them earlier.

`plain_linear_cross_entropy` is the twin, and the reference of the tests.
`liger_linear_cross_entropy` calls a kernel of another package. There is no label
smoothing and there are no class weights. A loss per token is not supported, because its
backward would have to wait for the incoming gradients; nor are second derivatives.
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
"""Label of tokens that are not part of the loss, as in torch and transformers."""


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
    """Return the cross-entropy of `hidden weight^T + bias`, computed chunk by chunk.

    Logits are computed in the dtype of `hidden`, under autocast in that of autocast;
    softmax, loss and sums in float32, for float64 in float64. With a single chunk, loss
    and gradients have the same bits as those of the plain twin, except for two that are
    more precise here: float16 gradients, which underflow sooner in the twin, and the
    gradient of a bias under autocast.

    At most `chunk_tokens * vocab * 12` bytes are alive for logits (24 in float64). Kept
    for backward are `tokens * hidden` in the dtype of `hidden`, and, if and only if
    `weight` requires a gradient, `vocab * hidden * 4` bytes (8 in float64). Under
    autocast the cast of the weight is alive during the forward.

    Args:
        hidden: one row per token, `tokens hidden`.
        weight: one row per class, `vocab hidden`.
        labels: one class per token, int64, `tokens`.
        bias: the bias of the logits, `vocab`.
        ignore_index: the label of tokens to leave out. If all are left out, gradients
            are 0, and the loss is NaN unless `num_items` is given.
        num_items: the divisor of the sum over tokens: 1 for the sum itself, None for
            the number of labels that are not left out, which gives the mean.
        chunk_tokens: rows of logits that exist at a time, at least 1.

    Returns:
        The loss, which is not finite if a logit that contributes to it is not.
    """
    if not torch.is_grad_enabled():
        # Only then does the autograd function know that no gradient is needed.
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
    """Return the same loss under ordinary autograd, with all logits at once.

    Args:
        hidden: one row per token, `tokens hidden`.
        weight: one row per class, `vocab hidden`.
        labels: one class per token, int64, `tokens`.
        bias: the bias of the logits, `vocab`.
        ignore_index: the label of tokens to leave out.
        num_items: the divisor of the sum over tokens; None for the mean.
    """
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
    """Return the same loss, computed by Triton kernels of `liger-kernel` on CUDA.

    The kernels choose their chunks themselves. The tests of this project run without a
    GPU: they check how the kernels are called, not what they compute.

    Args:
        hidden: one row per token, `tokens hidden`.
        weight: one row per class, `vocab hidden`.
        labels: one class per token, int64, `tokens`.
        bias: the bias of the logits, `vocab`.
        ignore_index: the label of tokens to leave out.
        num_items: the divisor of the sum over tokens; None for the mean.

    Raises:
        ConfigError: `liger-kernel` is not installed.
        UnsupportedCallError: `hidden` is not on CUDA, or `weight` requires a gradient
            and `hidden` does not.
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
    """Import and return the loss function of `liger-kernel`.

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
    """The autograd function that the module's docstring describes.

    Note: [The divisor is split in two]

    A loss scaler multiplies the loss to keep float16 gradients out of the subnormals,
    but here the gradients are computed before the loss is scaled. 1/n is therefore
    split into a mantissa and a power of two: the logits' gradients are computed with
    the mantissa, in a range that float16 can represent, and the backward multiplies by
    the power of two together with the incoming gradient, in float32. Powers of two are
    exact, so the result does not change in any other dtype.
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
        """Return the loss, and compute the gradients that are needed.

        Args:
            ctx: the autograd context.
            hidden: one row per token, `tokens hidden`.
            weight: one row per class, `vocab hidden`.
            bias: the bias of the logits, `vocab`.
            labels: one class per token, `tokens`.
            ignore_index: the label of tokens to leave out.
            num_items: the divisor of the sum over tokens; None for the mean.
            chunk_tokens: rows of logits that exist at a time.

        Returns:
            The loss, a scalar.
        """
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
        # With no items the mantissa is infinite and the exponent is undefined.
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
        # Computed in the dtype of the loss, because the factor alone may be out of the
        # range of float16.
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
    """Return dz, where `share` is 1/n, or 0 for ignored tokens.

    Args:
        log_p: log-probabilities, `chunk vocab`.
        labels: one class per token, `chunk`.
        share: the weight of each token, `chunk`.
    """
    d_log_p = torch.zeros_like(log_p)
    rows = torch.arange(len(log_p), device=log_p.device)
    d_log_p[rows, labels.where(share != 0, 0)] = -share
    # Autograd itself calls this operation, so the bits are the same. A graph for
    # autograd would expose the logits to code that counts or offloads saved tensors.
    dz: Tensor = torch.ops.aten._log_softmax_backward_data(
        d_log_p, log_p, 1, log_p.dtype
    )
    return dz


def _add_product_(
    d_weight: Float[Tensor, "vocab hidden"],
    dz: Float[Tensor, "chunk vocab"],
    inputs: Float[Tensor, "chunk hidden"],
) -> None:
    """Add a chunk's dW, which is dz^T inputs, to `d_weight` in place."""
    if dz.dtype == torch.bfloat16:
        d_weight += dz.t() @ inputs
    else:
        # The same holds for float16: the sum over tokens could overflow before any loss
        # scaler detects it.
        d_weight.addmm_(dz.t().to(d_weight.dtype), inputs.to(d_weight.dtype))
