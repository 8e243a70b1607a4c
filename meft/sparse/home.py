"""Rows that are at home on the device: they take their optimizer steps there.

    read(ids)     their values, computed on the device from p, m, v and the factors
    step(...)     AdamW by the same formula (`meft.sparse.adam`), with the same bits
    recall(ids)   p, m and v go back to the store
    exchange()    after a step of the optimizer: some rows leave and others enter, p, m
                  and v of all blocks in one transfer each (`meft.sparse.admission`)

The home holds p, m and v as of each row's last gradient, 12 bytes a number. Factors and
step counts stay in the store, on the host, which knows without any transfer which rows
have a gradient; those of rows that are read or stepped are uploaded, 96 bytes a row.
The host therefore waits only where rows leave.
"""

import functools
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from meft.sparse import adam
from meft.sparse.adam import RowTable
from meft.sparse.adam_on import adam_on
from meft.sparse.admission import HomeSlots, Moving
from meft.sparse.cache import Longs
from meft.sparse.idle import Factors
from meft.sparse.shapes import Ids, SomeRows
from meft.sparse.store import RowStore
from meft.transfer import Link, PendingCopy, TransferTag

STATES = 3
"""p, m and v, float32."""
_TEMPORARIES = 16
"""Float32 numbers per number of a row that a step takes meanwhile, at most."""


@runtime_checkable
class Carrier(Protocol):
    """The engine as the home uses it."""

    link: Link

    def states(self) -> Float[Tensor, "3 slots width"]:
        """The slots of the home, on the device."""

    def upload(self, tensor: Tensor, tag: TransferTag) -> PendingCopy:
        """Start a copy to the device."""

    def download(self, tensor: Tensor, tag: TransferTag) -> PendingCopy:
        """Start a copy to the host."""


class Home:
    """The rows of all blocks that take their steps on the device.

    Args:
        stores: the rows of each block.
        num_slots: number of rows that fit.
        working_bytes: memory of the device for computations with some of them.
        engine: holds the slots and copies tensors.
    """

    def __init__(
        self,
        stores: list[RowStore],
        num_slots: int,
        working_bytes: int,
        engine: Carrier,
    ) -> None:
        self._stores = stores
        first = stores[0]
        wire = first.transfer_dtype.itemsize
        self.slots = HomeSlots(len(stores), len(first), num_slots, 4 * STATES / wire)
        """Which rows are at home, and where."""
        self._engine = engine
        self._piece = max(working_bytes // (4 * _TEMPORARIES * first.width), 1)
        self._moving = max(working_bytes // (4 * STATES * first.width), 1)
        self._has_stepped = False
        if num_slots:
            for block, store in enumerate(stores):
                store.recall = functools.partial(self.recall, block)

    def read(self, block: int, ids: Longs, tag: TransferTag) -> SomeRows:
        """Return current rows of a block, all of them at home, in the transfer dtype.

        Args:
            block: the block.
            ids: indices of its rows.
            tag: the key of the transfers in the ledger.
        """
        store = self._stores[block]
        places = self._upload_places(self.slots.slots_of(block, ids), tag)
        factors = self._upload(store.factors[torch.from_numpy(ids)], tag)
        states = self._engine.states()
        out = states.new_empty(len(ids), store.width, dtype=store.transfer_dtype)
        for some in self._pieces(len(ids)):
            table = _table(states[:, places[some]], factors[some])
            every = torch.arange(len(table.rows), device=places.device)
            adam_on(places.device).values(table, every, out[some], every)
        return out

    def step(
        self,
        block: int,
        ids: Ids,
        gradient: SomeRows,
        here: tuple[Longs, Float[Tensor, "moved width"]],
        tag: TransferTag,
    ) -> None:
        """Take the last step of the block's schedule with rows here and in the store.

        Args:
            block: the block.
            ids: its rows in the store that have a gradient.
            gradient: their gradient, float32.
            here: its rows at home that have a gradient, and their gradient, float32, on
                the device.
            tag: the key of the transfers in the ledger.
        """
        store, (moved, of_moved) = self._stores[block], here
        self._has_stepped = True
        held, _ = self.slots.held(block)
        # Factors are those before the step, whose effect on them is the store's.
        due = store.due(torch.from_numpy(np.setdiff1d(held, moved))).numpy()
        changing = np.concatenate([moved, due])
        factors = store.factors[torch.from_numpy(changing)]
        store.step(ids, gradient, torch.from_numpy(moved))
        if not len(changing):
            return
        assert store.schedule is not None
        places = self._upload_places(self.slots.slots_of(block, changing), tag)
        factors = self._upload(factors, tag)
        states = self._engine.states()
        for some in self._pieces(len(changing)):
            copies = states[:, places[some]]
            table = _table(copies, factors[some])
            every = torch.arange(len(table.rows), device=places.device)
            part = of_moved[some]
            adam_on(places.device).advance(
                table, every[: len(part)], part, store.schedule, idle=False
            )
            if len(part) < len(every):
                adam.settle(table, every[len(part) :], store.schedule)
            states[:, places[some]] = copies

    def recall(self, block: int, ids: Ids | None = None) -> None:
        """Return rows of a block to its store.

        Args:
            block: the block.
            ids: which rows; None for all that are at home.
        """
        if ids is None:
            back, slots = self.slots.held(block)
        else:
            slots = self.slots.slots_of(block, ids.numpy())
            back, slots = ids.numpy()[slots >= 0], slots[slots >= 0]
        for some in self._pieces(len(back)):
            self._take_back([Moving(block, back[some], slots[some])])

    def exchange(self) -> None:
        """Let rows leave and enter, once after each step of the optimizer."""
        if not self._has_stepped or not len(self.slots):
            return
        self._has_stepped = False
        may_enter = np.array([store.schedule is not None for store in self._stores])
        leaving, entering = self.slots.exchange(may_enter, self._moving)
        self.slots.fade()
        if leaving:
            self._take_back(leaving)
        if entering:
            self._take_in(entering)

    def _take_back(self, leaving: list[Moving]) -> None:
        slots = np.concatenate([slots for _, _, slots in leaving])
        places = self._upload_places(slots, _TAG)
        states = self._engine.download(self._engine.states()[:, places], _TAG).get()
        first = 0
        for block, ids, _ in leaving:
            some = states[:, first : first + len(ids)]
            self._stores[block].take_back(torch.from_numpy(ids), some)
            self.slots.release(block, ids)
            first += len(ids)

    def _take_in(self, entering: list[Moving]) -> None:
        slots = np.concatenate([slots for _, _, slots in entering])
        shape = STATES, len(slots), self._stores[0].width
        states = self._engine.link.staging(shape, torch.float32)
        first = 0
        for block, ids, _ in entering:
            some = states[:, first : first + len(ids)]
            self._stores[block].lend(torch.from_numpy(ids), some)
            first += len(ids)
        places = self._upload_places(slots, _TAG)
        self._engine.states()[:, places] = self._upload(states, _TAG)
        for block, ids, slots in entering:
            self.slots.occupy(block, ids, slots)

    def _pieces(self, count: int) -> Iterator[slice]:
        for first in range(0, count, self._piece):
            yield slice(first, first + self._piece)

    def _upload(self, tensor: Tensor, tag: TransferTag) -> Tensor:
        return self._engine.upload(tensor, tag).get()

    def _upload_places(self, places: Longs, tag: TransferTag) -> Tensor:
        return self._upload(torch.from_numpy(places.astype(np.int32)), tag).long()


_TAG = TransferTag(place="home", phase="update")


def _table(states: Float[Tensor, "3 some width"], factors: Factors) -> RowTable:
    """Return a table of copies of rows; numbers of their steps are not kept in it."""
    rows, first, second = states
    steps = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    return RowTable(
        rows=rows, first=first, second=second, factors=factors, updated_at=steps
    )
