"""The arithmetic of one forward: the number format of its streams.

A forward with `fixed` streams begins with 32 bits, and is run again with 64 if a number
does not fit.
"""

import torch

from meft.bottleneck import wide_dtype
from meft.reversible.config import ReversibleConfig
from meft.reversible.coupling import Arithmetic
from meft.reversible.execution_context import ExecutionContext
from meft.reversible.fixed import Fixed
from meft.reversible.floating import Floating
from meft.reversible.integer_format import FRACTION_BITS, FRACTION_BITS_WIDE
from meft.shapes import Hidden


def arithmetic_of(
    config: ReversibleConfig, hidden: Hidden, stream_dtype: torch.dtype
) -> Arithmetic:
    """Return the arithmetic of a forward.

    Args:
        config: the config of the reversible model.
        hidden: the hidden states that enter the stack, `batch seq hidden`.
        stream_dtype: the dtype of `fixed` streams.
    """
    if config.arithmetic == "float":
        return Floating(
            compute_dtype=hidden.dtype, stream_dtype=wide_dtype(hidden.dtype)
        )
    execution = ExecutionContext.current(hidden.device)
    computed_in = execution.computed_in or hidden.dtype
    return Fixed(
        compute_dtype=hidden.dtype,
        fraction_bits=(
            FRACTION_BITS.get(computed_in, FRACTION_BITS_WIDE)
            if config.fraction_bits is None
            else config.fraction_bits
        ),
        gradient_dtype=getattr(torch, config.gradient_dtype),
        stream_dtype=stream_dtype,
    )


def too_large(block: int, greatest: float | None) -> str:
    """Return the message for numbers that 64 bits do not hold.

    Args:
        block: the index of the lowest block with such numbers.
        greatest: its greatest value; None if the values fit and the streams do not.
    """
    if greatest is None:
        return (
            f"the streams of block {block} have grown beyond what 64-bit integers "
            "hold, though all values of its branches fit: set `lost_bits` higher in "
            "the `ReversibleConfig`, at 0 the streams grow with every block"
        )
    return (
        f"block {block} computes values up to {greatest:.4g}, which `fixed` streams "
        "cannot hold in 64 bits either: look for what made them so large, or set "
        "`fraction_bits` lower in the `ReversibleConfig` (each bit less doubles the "
        "range)"
    )
