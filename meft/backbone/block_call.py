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
    if signature is None:
        raise UnsupportedCallError(
            f"the `forward` of {plain.__name__} does not name the arguments that it "
            "takes: give it the signature of the `forward` that it replaces, by "
            "`functools.wraps` or in its definition"
        )
    try:
        bound = signature.bind(None, *args, **kwargs).arguments
    except TypeError as error:
        raise UnsupportedCallError(
            f"a {plain.__name__} of a reversible stack was called with arguments that "
            f"its `forward` does not take so: {error}. Hidden states are its first "
            "argument"
        ) from error
    _, first, *names = bound  # without `self`
    others: dict[str, Any] = {}
    for name in names:
        is_rest = signature.parameters[name].kind is Parameter.VAR_KEYWORD
        others |= bound[name] if is_rest else {name: bound[name]}
    return bound[first], others


def first_name(plain: type[nn.Module]) -> str:
    """Return the name of the first argument of a block, its hidden states."""
    kind: Any = plain
    signature = _signature(kind)
    if signature is None:
        return "hidden_states"
    return list(signature.parameters)[1]


@functools.cache
def _signature(plain: Any) -> inspect.Signature | None:
    """Return the signature of the first `forward` that names its arguments.

    A derived class may pass everything on. None if no class in the order of resolution
    names them.
    """
    forwards = (k.forward for k in plain.__mro__ if hasattr(k, "forward"))
    named = (s for s in map(inspect.signature, forwards) if _is_named(s))
    return next(named, None)


def _is_named(signature: inspect.Signature) -> bool:
    _, *parameters = signature.parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    starts_with_hidden_states = kinds[:1] in (
        [Parameter.POSITIONAL_OR_KEYWORD],
        [Parameter.POSITIONAL_ONLY],
    )
    # The others are given by name.
    rest = {Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_ONLY}
    return starts_with_hidden_states and rest.isdisjoint(kinds[1:])
