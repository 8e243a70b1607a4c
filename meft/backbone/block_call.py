"""The arguments of a block by name."""

import functools
import inspect
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn

from meft.errors import UnsupportedCallError


def by_name(
    plain: type[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the hidden states and the other arguments of a block, these by name.

    Args:
        plain: the class of the block.
        args: the positional arguments of a call.
        kwargs: its keyword arguments.

    Raises:
        UnsupportedCallError: the `forward` of the class does not name the arguments.
    """
    kind: Any = plain  # whose type is not said to be hashable
    signature = _signature(kind)
    bound = signature.bind(None, *args, **kwargs).arguments
    parameters = signature.parameters
    _, *names = bound  # without `self`
    others: dict[str, Any] = {}
    for name in names:
        kind = parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            raise UnsupportedCallError(
                f"the `forward` of {plain.__name__} takes positional arguments as "
                f"`*{name}`, so their names are unknown: give it the signature of the "
                "`forward` that it replaces"
            )
        others |= bound[name] if kind is Parameter.VAR_KEYWORD else {name: bound[name]}
    hidden = others.pop("hidden_states" if "hidden_states" in others else names[0])
    return hidden, others


@functools.cache
def _signature(plain: Any) -> inspect.Signature:
    """Return the signature of the first `forward` that names its arguments.

    A derived class may pass everything on.
    """
    found = [
        inspect.signature(k.forward) for k in plain.__mro__ if hasattr(k, "forward")
    ]
    named = (s for s in found if _names_hidden_states(s))
    return next(named, found[0])


def _names_hidden_states(signature: inspect.Signature) -> bool:
    _, *parameters = signature.parameters.values()
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return bool(parameters) and parameters[0].kind not in variable
