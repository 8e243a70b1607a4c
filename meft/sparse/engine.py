"""The device side of offloaded rows: their slots, and the link to the host.

All transfers are recorded in the ledger under the block and the phase: rows, gradients,
and the indices that identify them (int32 to the device, one byte per flag to the host).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from meft.sparse.cache import GradientSlots, RowCache
from meft.sparse.config import SparseConfig
from meft.sparse.home import STATES, Home
from meft.sparse.host_gradient import HostGradient
from meft.sparse.rows import Rows
from meft.sparse.store import RowStore
from meft.transfer import Link, PendingCopy, TransferLedger, TransferTag


class EngineRows(Rows, Protocol):
    """The rows of one block that an engine transfers."""

    def leave_device(self) -> None:
        """Download the gradients that are only on the device, before it is changed."""

    def prefetch(self) -> None:
        """Fetch uncached rows that will be used, as far as there is room."""


MakeRows = Callable[["Engine", int, RowStore], EngineRows]


class Engine:
    """The device side of all blocks' rows: the cache and the link to the host.

    Args:
        stores: the rows of each block, which are moved to host memory.
        config: the cache and its size.
        make_rows: creates the rows of a block, given the engine, the index of the block
            and its store.
    """

    def __init__(
        self, stores: list[RowStore], config: SparseConfig, make_rows: MakeRows
    ) -> None:
        self.config = config
        self.ledger = TransferLedger()
        self.link = Link(torch.device("cpu"), self.ledger)
        for store in stores:
            # A model may be unpickled directly onto a device.
            store.to(torch.device("cpu"))
        first = stores[0]
        self._num_slots = slots_for(
            config, len(stores) * len(first), first.width, first.transfer_dtype
        )
        rows, gradients, at_home = self._num_slots
        self.cache = RowCache(len(stores), len(first), rows)
        self.gradients = GradientSlots(len(stores), len(first), gradients)
        self.home = Home(stores, at_home, config.device_bytes // 8, self)
        self._slabs: tuple[Tensor, Tensor, Tensor] | None = None
        self._make_rows = make_rows
        self._coming: HostGradient | None = None
        """The gradient that was sent to the host last."""
        self.blocks = [
            make_rows(self, index, store) for index, store in enumerate(stores)
        ]
        self.peak_staging_bytes = 0
        """Size of the largest single transfer."""
        self.num_taken, self.num_hits, self.num_prefetched = 0, 0, 0
        """Numbers of rows requested, found in the cache, and prefetched."""

    def __reduce__(self) -> Any:
        """Reduce to the rows; copies, also saved ones, have no gradients or cache."""
        stores = [block.store for block in self.blocks]
        return Engine, (stores, self.config, self._make_rows)

    @property
    def slabs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slots for rows, for gradients, and for p, m and v at home."""
        if self._slabs is None:
            store, device = self.blocks[0].store, self.link.device
            slots, width = self._num_slots, store.width
            dtype = store.transfer_dtype
            # Those of an evaluation in inference mode could not be trained later.
            with torch.inference_mode(False):
                self._slabs = (
                    torch.zeros(slots.rows, width, dtype=dtype, device=device),
                    torch.zeros(slots.gradients, width, device=device),
                    torch.zeros(STATES, slots.home, width, device=device),
                )
        return self._slabs

    def states(self) -> Tensor:
        """Return the slots for p, m and v of rows at home, `3 slots width`."""
        return self.slabs[2]

    def reset_counters(self) -> None:
        """Set all counters to 0."""
        self.ledger.clear()
        self.peak_staging_bytes = 0
        self.num_taken, self.num_hits, self.num_prefetched = 0, 0, 0

    def use(self, device: torch.device) -> None:
        """Compute on `device` from now on."""
        if device == self.link.device:
            return
        for block in self.blocks:
            block.leave_device()
        self.cache.clear()
        self._slabs = None
        self.link = Link(device, self.ledger)

    def upload(self, tensor: Tensor, tag: TransferTag) -> PendingCopy:
        """Start a copy to the device."""
        self.peak_staging_bytes = max(self.peak_staging_bytes, tensor.nbytes)
        return self.link.upload(tensor, tag)

    def download(self, tensor: Tensor, tag: TransferTag) -> PendingCopy:
        """Start a copy to the host."""
        self.peak_staging_bytes = max(self.peak_staging_bytes, tensor.nbytes)
        return self.link.download(tensor, tag)

    def expect(self, gradient: HostGradient) -> None:
        """Wait for the gradient that was sent before this one.

        It arrived while the device computed this one, and one at a time takes room.
        """
        if self._coming is not None:
            self._coming.arrive()
        self._coming = gradient

    def prefetch(self, block: int) -> None:
        """Fetch the rows that `block` will use, if the cache has room."""
        if self.config.prefetch and 0 <= block < len(self.blocks):
            self.blocks[block].prefetch()


class Slots(NamedTuple):
    """How many rows have a slot of each kind."""

    rows: int
    gradients: int
    home: int


def slots_for(
    config: SparseConfig, num_rows: int, width: int, transfer_dtype: torch.dtype
) -> Slots:
    """Return how many rows, and how many gradients, have a slot in the budget.

    Rows come first: one that is not here is fetched in every forward and in every
    backward. A gradient that is not here is sent to the host in every backward, and in
    the other direction. With a home, what rows leave is for those at home, which have
    p, m and v here, and a slot for the gradient, which others do not have: a slot saves
    a row one of three transfers of a step at 2 bytes a number, a home the other two at
    16 more.

    Args:
        config: the budget (`device_bytes`), and what the cache holds.
        num_rows: the number of rows of all blocks.
        width: numbers in a row.
        transfer_dtype: dtype of the cached rows.
    """
    budget = config.device_bytes * 7 // 8 if config.cache != "off" else 0
    of_row = width * transfer_dtype.itemsize
    rows = min(budget // of_row, num_rows)
    left = budget - rows * of_row
    if config.cache == "home":
        home = min(left // (width * 4 * (STATES + 1)), num_rows)
        return Slots(rows, home, home)
    return Slots(rows, min(left // (width * 4), num_rows), 0)
