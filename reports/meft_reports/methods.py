"""Properties of a method that follow from its name: its twin, and the options it uses.

meftN               the paper's arithmetic, in floating point
meftN-exact         integer streams, whose inverse is exact
...-store           the plain twin: the same function, nothing rebuilt
dense, sparse...    adapters of many neurons; `-experts` are routed
"""

from collections.abc import Callable

from meft_reports.style import LOOKS

RIVAL = "adapters-checkpointing"
"""Reference of the exact methods: adapters whose blocks are checkpointed."""


def is_meft(method: str) -> bool:
    """Return whether the method has MEFT's two streams, rebuilt or stored."""
    return method.startswith("meft")


def is_exact(method: str) -> bool:
    """Return whether its streams are integers."""
    return is_meft(method) and "-exact" in method


def is_stored(method: str) -> bool:
    """Return whether it is a plain twin, which stores what the method rebuilds."""
    return method.endswith("-store")


def rebuilt(method: str) -> str:
    """Return the method itself, given the method or its plain twin."""
    return method.removesuffix("-store")


def in_floats(method: str) -> str:
    """Return the method of the same variant, rebuilt, in the paper's arithmetic."""
    return rebuilt(method).removesuffix("-exact")


def is_sparse(method: str) -> bool:
    """Return whether few of its neurons are active, with rows in host memory."""
    return method.startswith("sparse")


def has_experts(method: str) -> bool:
    """Return whether a router chooses among its neurons."""
    return method.startswith("sparse-experts")


def has_neurons(method: str) -> bool:
    """Return whether it is an adapter of many neurons parallel to the feed-forward."""
    return is_sparse(method) or method.startswith("dense")


_HEEDS: dict[str, Callable[[str], bool]] = {
    "bottleneck_size": lambda m: is_meft(m) or m.startswith("adapters"),
    "lora_rank": lambda m: m.startswith("lora"),
    "lost_bits": is_exact,
    "reversible_blocks": lambda m: is_meft(m) and not is_stored(m),
    "mlp_chunks": is_meft,
    "num_neurons": has_neurons,
    "top_k_neurons": is_sparse,
    "num_experts": has_experts,
    "row_budget_bytes": lambda m: is_sparse(m) or m == "dense-offload",
    "top_k_experts": has_experts,
    "active_fraction": is_sparse,
}


def heeds(method: str, option: str) -> bool:
    """Return whether `option` of a cell has an effect on `method`.

    An unknown method is assumed to use all options.
    """
    return method not in LOOKS or option not in _HEEDS or _HEEDS[option](method)
