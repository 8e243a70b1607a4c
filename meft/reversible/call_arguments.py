"""The arguments that a model's loop passes to every block of a stack.

They are bound by name. Those that a stack cannot support are refused, and a cache is
left empty in training, as a recompute would fill it again.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from meft.backbone.caches import cache_of, name_of_cache
from meft.errors import UnsupportedCallError
from meft.shapes import Hidden

_LEFT_EMPTY = "_left_empty_by_a_reversible_model"
"""Attribute set on a cache that was passed to a training forward and not filled."""


def by_name(
    block: type[nn.Module],
    hidden: Hidden,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a block other than the hidden states, by name.

    Args:
        block: the class of the blocks.
        hidden: the hidden states, `batch seq hidden`.
        args: the other positional arguments.
        kwargs: the keyword arguments.
    """
    signature = inspect.signature(block.forward)
    bound = signature.bind(None, hidden, *args, **kwargs).arguments
    call = {**bound, **bound.pop("kwargs", {})}
    call.pop("kwargs", None)
    del call["self"], call["hidden_states"]
    return call


def refuse_outputs(call: dict[str, Any], model_config: Any) -> None:
    """Refuse requests of tensors between blocks; remove them from `call`.

    Raises:
        UnsupportedCallError: `call` or the config of the model requests such tensors.
    """
    for name in ("output_hidden_states", "output_attentions"):
        requested = call.pop(name, None)
        if requested is None:
            requested = getattr(model_config, name, False)
        if requested:
            raise UnsupportedCallError(
                f"`{name}=True` is not supported by a reversible model: between "
                "blocks there are two streams, which are rebuilt and not kept"
            )


def refuse_empty_cache(call: Mapping[str, Any]) -> None:
    """Refuse a cache that an earlier forward has left empty.

    Raises:
        UnsupportedCallError: `call` has such a cache.
    """
    if getattr(cache_of(call), _LEFT_EMPTY, False):
        raise UnsupportedCallError(
            f"this `{name_of_cache(call)}` was given to a reversible model in training "
            "before, which left it empty: the tokens of that call would be "
            "missing. To train on a text in segments, call `model.eval()`: then "
            "caches are filled, gradients flow, and there is no dropout. Otherwise "
            "train without a cache, on whole texts, or pass a new cache"
        )


def leave_cache_empty(call: dict[str, Any]) -> None:
    """Remove a cache from the arguments of a training forward, and mark it.

    Raises:
        UnsupportedCallError: the cache holds tokens.
    """
    name = name_of_cache(call)
    cache = call.get(name)
    if cache is None:
        return
    if cache.get_seq_length() > 0:
        raise UnsupportedCallError(
            f"a reversible model in training was given a `{name}` that "
            "holds tokens, as peft's prefix tuning does: its recompute would "
            "add them again. Train without a cache, or call `model.eval()`"
        )
    # transformers creates an empty cache unless `use_cache=False` is given.
    call[name] = None
    setattr(cache, _LEFT_EMPTY, True)


def kind_of(call: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a call implies about its kernels: its tensors and their shapes."""
    return tuple(
        (n, (v.shape, v.dtype) if isinstance(v, Tensor) else type(v))
        for n, v in sorted(call.items())
    )
