"""`chunk_loss`: the loss of a causal language model without all logits in memory.

transformers' causal models compute logits for every token, upcast them, and compute the
loss from them. With a large vocabulary the logits are the largest tensor of a training
step, and the memory that a reversible stack saves is small in comparison. With
`chunk_loss`, a call with labels computes the loss from the last hidden states in one
function, `linear_cross_entropy`; a call without labels runs the model's own forward.

The model's `forward` is replaced on the instance, so class, modules, parameters and
names do not change.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from meft.backbone import caches
from meft.backbone.families import FAMILIES
from meft.backbone.find import transformers_model
from meft.backbone.uncalled import ignored
from meft.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from meft.linear_cross_entropy import (
    IGNORE_INDEX,
    import_liger,
    liger_linear_cross_entropy,
    linear_cross_entropy,
)
from meft.validate import integer

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[..., Tensor]
"""Signature (hidden, weight, labels, bias, ignore_index, num_items); returns a loss."""

SUPPORTED = {
    (family.module, family.causal_lm.model_class): family.causal_lm.body
    for family in FAMILIES
    if family.causal_lm is not None
}
"""By module and class: the body of the language models whose loss can be computed
without their logits.
"""

_forwards: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
"""Functions that `chunk_loss` has installed in models. An attribute of the function
would not identify them, because wrappers copy attributes.
"""


def chunk_loss(model: Model, chunk_tokens: int = 1024, backend: str = "torch") -> Model:
    """Compute the loss of a causal language model chunk by chunk, in place.

    For a batch of [batch, seq] tokens, `model(**inputs, labels=labels)` then returns
    the same loss as before, in training and in evaluation, and `logits` in its output
    is None. Every call without labels (generation, a user's own loss, the `Trainer`'s
    label smoothing) is as before, with all logits.

    Logits take `chunk_tokens * vocab * 12` bytes at a time, where they took up to
    `batch * seq * vocab * 16` (24 and 32 in float64). Kept for backward are a gradient
    of the size of the last hidden states, `batch * seq * hidden`, and, if the head is
    trained, one of `vocab * hidden` in at least float32.

    The loss is float32; for a float64 model it is float64, where transformers rounds to
    float32. `num_items_in_batch`, `ignore_index` and `shift_labels` have the same
    meaning as in transformers, so the `Trainer` normalises accumulated gradients as
    usual. Use one process per device: `nn.DataParallel` is not supported, and neither
    is pickling the whole model (the copy computes the same loss, with all logits).

    Args:
        model: a language model of OPT, LLaMA, Mistral, Qwen2, Qwen3, Gemma, Gemma 3,
            SmolLM3, Phi, Phi-3, OLMo 2, StableLM, GPT-2, GPT-NeoX, Falcon or BLOOM,
            reversible or not; it may be converted afterwards.
        chunk_tokens: number of tokens whose logits exist at a time.
        backend: `torch`; or `liger`, the fused kernels of the package `liger-kernel`,
            which choose their chunks themselves and run on CUDA only. The tests of this
            project run without a GPU and have never run these kernels.

    Returns:
        `model` itself. `unchunk_loss()` undoes the change.

    Raises:
        UnsupportedModelError: the model is of another class, has a loss function or
            head other than that of its class, or has a `forward` that was replaced
            already.
        ConfigError: `chunk_tokens` is not positive, or the backend does not exist or is
            not installed.
    """
    chunk_tokens = integer(1)("chunk_tokens", chunk_tokens)
    path = _body_path(model)
    reason = _unusual(model)
    if reason is not None:
        raise UnsupportedModelError(f"this {type(model).__name__} has {reason}")
    if "forward" in vars(model):
        raise UnsupportedModelError(
            "the loss of this model is chunked already"
            if _is_chunked(model)
            else "the `forward` of this model was replaced on the instance "
            "(accelerate does so in mixed precision): call `chunk_loss()` before that"
        )
    forward = _forward(type(model).forward, path, _loss(chunk_tokens, backend))
    model.forward = MethodType(forward, model)
    return model


def unchunk_loss(model: Model) -> Model:
    """Undo `chunk_loss()`, in place.

    Args:
        model: a model that `chunk_loss()` has changed.

    Returns:
        `model` itself, with the `forward` of its class.

    Raises:
        UnsupportedModelError: the loss is not chunked, or its `forward` has been
            wrapped since.
    """
    if not _is_chunked(model):
        raise UnsupportedModelError(
            "the loss of this model is not chunked, or its `forward` has been wrapped "
            "since `chunk_loss()`: unwrap it first"
        )
    del model.forward
    return model


def _body_path(model: nn.Module) -> str:
    # A subclass with its own forward may compute something else.
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    body = SUPPORTED.get((kind.__module__, kind.__name__))
    if body is not None:
        return body
    names = ", ".join(name for _, name in SUPPORTED)
    inner = transformers_model(model)
    advice = "" if inner is model else f". Call it on the {type(inner).__name__} inside"
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported: where its loss is computed, nothing "
        f"can take the place of the logits. Supported are transformers' {names}{advice}"
    )


def _unusual(model: Any) -> str | None:
    """Describe how `model` differs from its class, as the end of a sentence."""
    head = model.lm_head
    if type(head) is not nn.Linear:
        return f"an `lm_head` that is not a plain `nn.Linear`, but {head}"
    attached = ignored(head)
    if attached is not None:
        return f"on its `lm_head` {attached}, which would not run"
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        return f"logits that are capped (`final_logit_softcapping={cap}` in its config)"
    if model.loss_function is not ForCausalLMLoss:
        return "a `loss_function` that is not `ForCausalLMLoss`"
    return None


def _loss(chunk_tokens: int, backend: str) -> Loss:
    if backend == "torch":
        return functools.partial(linear_cross_entropy, chunk_tokens=chunk_tokens)
    if backend == "liger":
        import_liger()
        return liger_linear_cross_entropy
    raise ConfigError(f"`backend` must be 'torch' or 'liger', got {backend!r}")


def _is_chunked(model: nn.Module) -> bool:
    return getattr(vars(model).get("forward"), "__func__", None) in _forwards


def _forward(plain: Callable[..., Any], path: str, loss: Loss) -> Callable[..., Any]:
    """Return the new forward of a class whose own forward is `plain`."""
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(model, *args, **kwargs).arguments
        if call.get("labels") is None:
            return plain(model, *args, **kwargs)
        del call["self"]
        call.update(call.pop("kwargs", {}))
        return _with_loss(model, path, loss, **call)

    _forwards.add(forward)
    return forward


@can_return_tuple  # type: ignore[untyped-decorator]
def _with_loss(
    model: Any,
    path: str,
    loss: Loss,
    *,
    labels: Tensor,
    logits_to_keep: int | Tensor = 0,
    label_smoothing: float = 0.0,
    **call: Any,
) -> CausalLMOutputWithPast:
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        raise UnsupportedCallError(
            "`logits_to_keep` with `labels` is not supported: a chunked loss keeps "
            f"no logits. Set labels that shall not count to {IGNORE_INDEX}"
        )
    if label_smoothing != 0:
        raise UnsupportedCallError(
            "`label_smoothing` is not supported by a chunked loss; the `Trainer`'s "
            "`label_smoothing_factor` is, and computes all logits"
        )
    reason = _unusual(model)
    if reason is not None:
        raise UnsupportedCallError(f"this model has, since `chunk_loss()`, {reason}")
    outputs = model.get_submodule(path)(**call)
    hidden = outputs.last_hidden_state
    # From here on as in transformers' `ForCausalLMLoss`, up to the logits.
    ignore_index = call.get("ignore_index", IGNORE_INDEX)
    shifted = call.get("shift_labels")
    if shifted is None:
        shifted = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shifted.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"`labels` must have an entry for each of the {tuple(hidden.shape[:-1])} "
            f"tokens, got shape {tuple(labels.shape)}"
        )
    return CausalLMOutputWithPast(
        loss=loss(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            shifted.flatten().to(hidden.device),
            model.lm_head.bias,
            ignore_index=ignore_index,
            num_items=call.get("num_items_in_batch"),
        ),
        **{caches.FIELD: outputs.get(caches.FIELD)},
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
