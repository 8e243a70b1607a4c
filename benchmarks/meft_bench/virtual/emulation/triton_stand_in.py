"""Replacement for `meft.reversible.triton_kernels` where no GPU can run its kernels.

The functions allocate the memory that the kernels allocate, which is that of the kept
bits, and compute nothing. Builds of torch for CUDA include the triton that the kernels
need.
"""

from typing import Any

import torch
from torch import Tensor

from meft.reversible.packing import packed_bytes


def couple_(
    target: Tensor,
    source: Tensor,
    value: Tensor,
    num_bits: int,
    difference: bool,
    fraction_bits: int,
    keep: bool,
) -> Tensor | None:
    """Return the bits shifted out if `keep` is set; `target` is changed in place.

    Args:
        target: the stream that changes, of any shape.
        source: the stream that is read.
        value: the branch's output, which is added to `target`.
        num_bits: number of bits shifted out of each element.
        difference: whether the coupling scales differences.
        fraction_bits: number of fraction bits of the streams.
        keep: whether the bits shifted out are kept.

    Returns:
        The packed bits as a tensor of 32-bit integers, or None.
    """
    if not keep:
        return None
    num_words = packed_bytes(target.numel(), num_bits) // 4
    return target.new_empty(num_words, dtype=torch.int32)


def uncouple_(*args: Any, **kwargs: Any) -> None:
    """Do nothing; the kernel works in place and allocates nothing."""
