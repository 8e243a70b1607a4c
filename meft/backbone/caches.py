"""The cache of keys and values among the arguments of a block.

transformers 5.24 renamed the argument, and the field of outputs, from
`past_key_values` to `cache`. Both are understood here, and so are `layer_past`, as
blocks of GPT-NeoX, BLOOM and Falcon call theirs, and Mamba's `cache_params`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values", "layer_past", "cache_params")
"""Its names, that of the newest version first."""

FIELD = next(
    name
    for name in NAMES
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)
"""Its name, in models and outputs, in the transformers that is installed."""


def holds_tokens(cache: Any, layer: int = 0) -> bool:
    """Return whether a cache has been given tokens.

    Args:
        cache: a cache of transformers.
        layer: the layer to ask; for one without attention, all such layers are.
    """
    try:
        return bool(cache.get_seq_length(layer) > 0)
    except ValueError:  # linear attention does not count its tokens
        return bool(cache.has_previous_state())


def name_of_cache(call: Mapping[str, Any]) -> str:
    """Return the name under which arguments have a cache, or would have one.

    Args:
        call: the arguments of a block, by name.
    """
    return next((name for name in NAMES if is_cache(call.get(name))), FIELD)


def cache_of(call: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a block; None if there is none.

    Args:
        call: the arguments of a block, by name.
    """
    found = call.get(name_of_cache(call))
    return found if is_cache(found) else None


def is_cache(argument: Any) -> bool:
    """Return whether an argument is a cache of transformers, whatever its name."""
    return any(kind.__name__.endswith("Cache") for kind in type(argument).__mro__)
