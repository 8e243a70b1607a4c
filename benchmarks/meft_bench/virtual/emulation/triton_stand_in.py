"""Stands in for `meft.reversible.fused` where there is no GPU to launch its kernels.

Takes the memory that they take, which is that of the bits kept, and computes nothing.
A build of torch for CUDA brings the triton that they need.
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
    """The bits shifted out, if to `keep`; `target` stays where it is."""
    if not keep:
        return None
    num_words = packed_bytes(target.numel(), num_bits) // 4
    return target.new_empty(num_words, dtype=torch.int32)


def uncouple_(*args: Any, **kwargs: Any) -> None:
    """In place, with nothing beside."""
