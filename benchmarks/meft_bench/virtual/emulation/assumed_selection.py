"""Selections by a mask, of which every element is assumed to be selected.

Their number decides a shape and is a matter of values, of which there are none. All of
them is the most that there can be.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_impls

aten = torch.ops.aten


def places_of_all(tensor: Tensor) -> Tensor:
    """Return what `nonzero` returns where no element is zero, without values."""
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long)


@contextlib.contextmanager
def all_selected() -> Iterator[Counter[str]]:
    """Let a selection keep all elements while the context is active.

    Yields:
        The number of selections so far, by operator.
    """
    counts: Counter[str] = Counter()

    def _nonzero(mode: Any, func: Any, tensor: Tensor) -> Tensor:
        counts[str(func)] += 1
        return places_of_all(tensor)

    def _masked_select(mode: Any, func: Any, tensor: Tensor, mask: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        known = None if mode.values is None else mode.values.of(mask)
        if known is not None:
            return tensor.new_empty(int(known.expand(shape).sum()))
        counts[str(func)] += 1
        return tensor.new_empty(shape.numel())

    sizes = {
        aten.nonzero.default: _nonzero,
        aten.masked_select.default: _masked_select,
    }
    with mock.patch.dict(fake_impls.op_implementations_dict, sizes):
        yield counts
