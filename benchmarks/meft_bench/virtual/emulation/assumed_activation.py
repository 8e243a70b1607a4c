"""Sparse adapters on a virtual GPU, with an assumed set of active neurons.

Fake tensors have no values, so tokens cannot choose neurons. Instead, every batch is
assumed to activate the first neurons of each block. Their share is the
`active_fraction` of the cell, but their number is at most the number that the tokens of
the batch could choose. Every other size that depends on values is set to its maximum.
All batches activate the same neurons, which matters for caches.

The host side of rows (`meft.sparse.offloaded_rows`) runs unchanged: the position of
each row is kept in real tensors, and the engine's own counters report the transfers.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meft.host_memory import available_bytes
from meft.page_lock import page_locked
from meft.sparse.adam_on import adam_on
from meft.sparse.block_neurons import BlockNeurons
from meft.sparse.choice import distinct
from meft.sparse.indices import all_ids, ids_of, new_steps
from meft.sparse.shapes import Ids
from meft_bench.virtual.emulation import memo
from meft_bench.virtual.emulation.assumed_selection import places_of_all

aten = torch.ops.aten


@contextlib.contextmanager
def rows(
    active_fraction: float, add_host_traffic: Callable[[int], None]
) -> Iterator[None]:
    """Make rows usable with fake tensors while the context is active.

    Args:
        active_fraction: share of a block's neurons that a batch is assumed to activate;
            for methods that run every neuron, 1 is used instead.
        add_host_traffic: called with the bytes that AdamW reads and writes on the host.
    """
    declared = _Declared(active_fraction)
    on_host = _OnHost(add_host_traffic)
    with contextlib.ExitStack() as stack:
        for replacement in (
            distinct.replaced(declared.distinct),
            ids_of.replaced(declared.ids_of),
            all_ids.replaced(_all_ids),
            new_steps.replaced(_new_steps),
            page_locked.replaced(_same),
            available_bytes.replaced(_unknown),
            adam_on.replaced(functools.partial(_adam_on, on_host)),
        ):
            stack.enter_context(replacement)
        stack.enter_context(mock.patch.dict(fake_impls.op_implementations_dict, _SIZES))
        follow = frozenset([*_SIZES, memo.INDEX])
        stack.enter_context(mock.patch.object(memo, "ASSUMED", follow))
        yield


class _Declared:
    """Determine the number of active neurons from the assumed fraction."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._most = 0
        """Number of entries of the current choice."""
        self._share = 1.0

    def distinct(
        self,
        block: BlockNeurons,
        choice: Tensor,
        counts: Tensor | None = None,
        size: int = 1,
        is_there: bool = False,
    ) -> Callable[[], Ids]:
        """Call the library's function; store the number of entries of the choice."""
        config = block.config
        # A batch is assumed to use all experts that it can, because there are few.
        chooses = size == 1 and config.top_k_neurons < config.num_neurons
        share = self._fraction if chooses else 1.0
        get = distinct.plain(block, choice, counts, size, is_there)

        def declared() -> Ids:
            self._most, self._share = choice.numel(), share
            found = get()
            return _first(len(found)) if found.device.type == "cpu" else found

        return functools.cache(declared)

    def ids_of(self, flags: Tensor) -> Ids:
        """Return the first rows instead of those whose flag is set."""
        count = min(math.ceil(self._share * len(flags)), self._most)
        return torch.arange(count, device=flags.device)


def _first(count: int) -> Ids:
    """Return the first `count` ids in real memory, as the engine requires."""
    with unset_fake_temporarily():
        return torch.arange(count)


def _all_ids(num_rows: int, device: torch.device) -> Ids:
    return _first(num_rows)


def _new_steps(num_rows: int, device: torch.device) -> Tensor:
    with unset_fake_temporarily():
        return torch.zeros(num_rows, dtype=torch.long)


def _unknown(root: Path = Path("/")) -> None:
    """Fake rows use no memory."""


def _same(tensor: Tensor) -> Tensor:
    """Page-locking uses no memory."""
    return tensor


def _adam_on(on_host: "_OnHost", device: torch.device) -> Any:
    """Replace AdamW on the host, which uses no memory.

    AdamW on a device, which uses memory, is kept.
    """
    return on_host if device.type == "cpu" else adam_on.plain(device)


class _OnHost:
    """Record which rows changed: in every step, those that ever had a gradient.

    Args:
        add_traffic: called with the bytes that are read and written.
    """

    def __init__(self, add_traffic: Callable[[int], None]) -> None:
        self._add_traffic = add_traffic

    def advance(
        self, table: Any, ids: Ids, gradient: Any, schedule: Any, *, idle: bool
    ) -> None:
        """Count a pass over rows, both moments, gradient and the 16-bit copy."""
        if idle:
            table.updated_at[table.updated_at > 0] = schedule.step
        table.updated_at[ids] = schedule.step
        copied = 0 if table.shadow is None else table.shadow.element_size()
        read, written = 4 + 4 + 4 + 4, 4 + 4 + 4 + copied
        self._add_traffic(len(ids) * table.rows.shape[1] * (read + written))

    def due(self, table: Any, ids: Ids, schedule: Any) -> Ids:
        """Settle no row: which ones is a matter of values."""
        return ids[:0]

    def values(self, table: Any, ids: Ids, out: Tensor, places: Ids) -> None:
        """Read no values; count a pass over rows, both moments and the result."""
        per_number = 4 + 4 + 4 + out.element_size()
        self._add_traffic(len(ids) * table.rows.shape[1] * per_number)


# Sizes that depend on values are computed as if every condition held.


def _nonzero(mode: Any, func: Any, tensor: Tensor) -> Tensor:
    return places_of_all(tensor)


def _bincount(
    mode: Any, func: Any, tensor: Tensor, weights: Any = None, minlength: int = 0
) -> Tensor:
    return tensor.new_empty(minlength, dtype=torch.long)


def _unique(mode: Any, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return one value: all rows are at the same step."""
    none = tensor.new_empty(0, dtype=torch.long)
    return tensor.new_empty(1), none, none


_SIZES: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.bincount.default: _bincount,
    aten._unique2.default: _unique,
}
