"""Determine whether autograd accumulates one gradient into another in place.

It does so where it holds the only reference to the first gradient, but under a dispatch
mode it adds out of place (`can_accumulate_inplace` in torch/csrc/autograd): backward
would need up to an eighth more memory than without a ledger.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

SOLE_OWNER = (4, 2)
"""Number of references to a tensor, and to its storage, if autograd is the sole owner.

This is when only autograd holds a gradient and passes it to the dispatch mode.
"""


def is_accumulation(args: tuple[Any, ...]) -> bool:
    """Whether both are gradients and only autograd holds the first.

    Must be called in `__torch_dispatch__`, which the engine calls with no Python
    between.
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    one, other = args
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if not _engine_calls():
        return False
    storage = one.untyped_storage()
    return (
        one.shape == other.shape
        and one._use_count() <= SOLE_OWNER[0]  # type: ignore[attr-defined]
        and torch._C._storage_Use_Count(storage._cdata) <= SOLE_OWNER[1]
        and _is_dense(one)
    )


def _engine_calls() -> bool:
    """Whether there is no Python frame between autograd and the dispatch mode."""
    try:
        caller = sys._getframe(3)
    except ValueError:  # a thread of the engine, with no Python frame below
        return True
    return caller.f_code is _engine_run_backward.__code__


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous without gaps, in any order of dimensions."""
    expected = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True
