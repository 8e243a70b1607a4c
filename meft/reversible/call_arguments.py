"""The arguments that a model's loop passes to the blocks of a stack.

Those that a stack cannot support are refused, and a cache is left empty in training, as
a recompute would fill it again. Tensors that require a gradient are taken out of the
arguments (`take_apart`), because they have to be inputs of the stack's autograd
function, and are put back when a block is run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from meft.backbone.caches import FIELD, cache_of, holds_tokens, name_of_cache
from meft.errors import UnsupportedCallError
from meft.reversible.coupling import Context

_LEFT_EMPTY = "_left_empty_by_a_reversible_model"
"""Attribute set on a cache that was passed to a training forward and not filled."""
_BETWEEN = "between blocks there are two streams, which are rebuilt and not kept"
_NOT_KEPT = {
    "output_hidden_states": _BETWEEN,
    "output_attentions": _BETWEEN,
    "output_router_logits": (
        "blocks are run again in the backward, so the loss that balances the experts "
        "would count their routers more than once, without gradients. Pass "
        "`output_router_logits=False`, or set it in the config, to train without it"
    ),
}
"""Names of requests that are refused, and the reasons."""


def refuse_outputs(
    call: dict[str, Any], model_config: Any, removes: bool = True
) -> None:
    """Refuse requests of tensors from inside the stack; remove them from `call`.

    Args:
        call: the arguments of a call, by name.
        model_config: the config of the model.
        removes: whether to remove them, as those who run the parts of a block do not
            take them.

    Raises:
        UnsupportedCallError: `call` or the config of the model requests such tensors.
    """
    for name, reason in _NOT_KEPT.items():
        requested = call.pop(name, None) if removes else call.get(name)
        if requested is None:
            requested = getattr(model_config, name, False)
        if requested:
            raise UnsupportedCallError(
                f"`{name}=True` is not supported by a reversible model: {reason}"
            )


def refuse_empty_cache(call: Mapping[str, Any]) -> None:
    """Refuse a cache that an earlier forward has left empty.

    Raises:
        UnsupportedCallError: `call` has such a cache.
    """
    if getattr(cache_of(call), _LEFT_EMPTY, False):
        raise UnsupportedCallError(
            f"this `{FIELD}` was given to a reversible model in training "
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
    cache = cache_of(call)
    if cache is None:
        return
    if holds_tokens(cache):
        raise UnsupportedCallError(
            f"a reversible model in training was given a `{FIELD}` that "
            "holds tokens, as peft's prefix tuning does: its recompute would "
            "add them again. Train without a cache, or call `model.eval()`"
        )
    # transformers creates an empty cache unless `use_cache=False` is given.
    call[name] = None
    setattr(cache, _LEFT_EMPTY, True)


class Arguments:
    """The arguments of one block other than the hidden states.

    Args:
        call: the arguments by name.
        names: names of the tensors that require a gradient, by their id; new ones are
            added. A tensor that several blocks are given has one name.
    """

    def __init__(self, call: Mapping[str, Any], names: dict[int, str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._plain: dict[str, Any] = {}
        self._in_parts: dict[str, _Parts] = {}
        for name, value in call.items():
            leaves, spec = [value], None
            if isinstance(value, tuple | list | dict):
                leaves, spec = tree_flatten(value)
            wanted = [isinstance(t, Tensor) and t.requires_grad for t in leaves]
            if not any(wanted):
                self._plain[name] = value
                continue
            found = {i: leaves[i] for i, is_wanted in enumerate(wanted) if is_wanted}
            known = {
                i: names.setdefault(id(t), str(len(names))) for i, t in found.items()
            }
            self.tensors |= {known[i]: t for i, t in found.items()}
            rest = [None if i in found else leaf for i, leaf in enumerate(leaves)]
            self._in_parts[name] = _Parts(rest, known, spec)

    def given(self, context: Context) -> dict[str, Any]:
        """Return all arguments by name.

        Args:
            context: the tensors that require a gradient, by name.
        """
        return self._plain | {n: p.joined(context) for n, p in self._in_parts.items()}


@dataclass(frozen=True, slots=True)
class _Parts:
    """An argument without its tensors that require a gradient."""

    rest: list[Any]
    """The leaves, with None in place of those tensors."""
    names: Mapping[int, str]
    """Names of those tensors, by the position of the leaf."""
    spec: TreeSpec | None
    """How leaves are nested; None if the argument is such a tensor itself."""

    def joined(self, context: Context) -> Any:
        """Return the whole argument."""
        leaves = list(self.rest)
        for index, name in self.names.items():
            leaves[index] = context[name]
        return leaves[0] if self.spec is None else tree_unflatten(leaves, self.spec)


def take_apart(
    calls: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Tensor], list[Arguments]]:
    """Separate the tensors that require a gradient from the arguments of blocks.

    Args:
        calls: the arguments of each block by name, lowest block first.

    Returns:
        Those tensors by name, each once, and the arguments of each block.
    """
    names: dict[int, str] = {}
    arguments = [Arguments(call, names) for call in calls]
    context = {n: tensor for a in arguments for n, tensor in a.tensors.items()}
    return context, arguments


def kind_of(call: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a call implies about its kernels: its tensors and their shapes."""
    return tuple(
        (n, (v.shape, v.dtype) if isinstance(v, Tensor) else type(v))
        for n, v in sorted(call.items())
    )
