"""Numbers that are computed from two others of the same measurement.

    trainable_fraction      num_trainable_parameters / num_parameters
    peak_activation_bytes   peak_allocated_bytes - model_state_bytes
    transfer_bytes          h2d_bytes + d2h_bytes
    bits_per_device_byte    recalled_bits / trainable_device_bytes
    guard_ratio             guard_perplexity / guard_start_perplexity

The frame contains them, and `records` rejects a record in which one is out of its
range.
"""

import operator
from collections.abc import Mapping
from typing import Any


def derive(measurement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the derived numbers of a measurement by name.

    Args:
        measurement: measurement of a record; its numbers may be missing or None.

    Returns:
        A number where both of its sources are known, else None. A share of no
        parameters is also None.
    """
    found = {}
    for name, (formula, *sources) in DERIVED.items():
        values = [measurement.get(source) for source in sources]
        found[name] = None if None in values else formula(*values)
    return found


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


DERIVED: dict[str, tuple[Any, str, str]] = {
    "trainable_fraction": (_share, "num_trainable_parameters", "num_parameters"),
    "peak_activation_bytes": (
        operator.sub,
        "peak_allocated_bytes",
        "model_state_bytes",
    ),
    "transfer_bytes": (operator.add, "h2d_bytes", "d2h_bytes"),
    "bits_per_device_byte": (_share, "recalled_bits", "trainable_device_bytes"),
    "guard_ratio": (_share, "guard_perplexity", "guard_start_perplexity"),
}
"""Formula and sources of each number."""
