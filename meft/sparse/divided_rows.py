"""Rows of one block that are divided among processes.

Each process keeps its own rows, with their optimizer state, in a `RowStore` of its own:

    prepare(ids)      ask the owners for current rows, all processes at once; those that
                      are on the device already, in their current value, are not sent
    take(ids)         as for offloaded rows, from what was received
    add_gradient(...) keep the gradient of this process, in host memory
    reduce()          after a backward pass: send it to the owners of the rows, each of
                      which has then, for its own rows,

        mean = 1/R * sum over processes r of (mean before + gradient of r)

    gradient()        the mean, for the optimizer step of the own rows

This is the arithmetic of `meft.sparse.row_mean`, in which every process has all rows,
and gives the same bits. Indices of rows are those of the whole table in what an adapter
calls, and those of the store in what an optimizer and `parameter.grad` call.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meft.errors import UnsupportedCallError
from meft.sparse import division as dividing
from meft.sparse.config import SparseConfig
from meft.sparse.division import Division
from meft.sparse.engine import Engine, slots_for
from meft.sparse.host_gradient import HostGradient
from meft.sparse.offloaded_rows import OffloadedRows
from meft.sparse.rows import Kept, Rows, Tokens
from meft.sparse.shapes import Ids, SomeRows
from meft.sparse.store import RowStore
from meft.transforms import in_backward


class Received(RowStore):
    """The rows of all processes as an engine reads them: what `fetch` received last.

    It has no rows and no optimizer state of its own, and only the part of `RowStore`
    that an engine reads.

    Args:
        store: the rows of this process.
        division: which process has which rows.
    """

    def __init__(self, store: RowStore, division: Division) -> None:
        self._store = store
        self._division = division
        self.transfer_dtype = store.transfer_dtype
        self.forget()

    def __len__(self) -> int:
        return self._division.num_rows

    @property
    @override
    def width(self) -> int:
        return self._store.width

    @override
    def to(self, device: torch.device) -> None:
        """Do nothing, as rows of others are received in host memory."""

    def forget(self) -> None:
        """Drop what was received."""
        self._ids = self._version = torch.zeros(0, dtype=torch.long)
        self._sent_ids = self._sent_places = torch.zeros(0, dtype=torch.long)
        self._sent = torch.zeros(0, self.width, dtype=self.transfer_dtype)

    def fetch(self, ids: Ids, known: Tensor) -> None:
        """Ask the owners of rows for their versions and values.

        Args:
            ids: the rows, ascending, `some`.
            known: the version of each whose value is here, -1 for none; those rows are
                received only if their version is another.
        """
        division = self._division
        call = dividing.BACKWARD if in_backward() else dividing.FORWARD
        of_each = division.of_each(ids)
        order = torch.cat(of_each)
        to_each = [len(some) for some in of_each]
        from_each = division.announce(call, to_each)
        asked = torch.stack([ids[order], known[order]], 1)
        requests = division.exchange(asked, to_each, from_each, call)
        there = requests[:, 0] // division.size
        version = self._store.version(there)
        versions = division.exchange(version, from_each, to_each, call)
        wanted = version != requests[:, 1]
        # Rows that several processes ask for are computed once.
        distinct, places = there[wanted].unique(return_inverse=True)
        rows = self._store.read(distinct)[places]
        is_sent = versions != known[order]
        outgoing = [int(part.sum()) for part in wanted.split(from_each)]
        incoming = [int(part.sum()) for part in is_sent.split(to_each)]
        self._sent = division.exchange(rows, outgoing, incoming, call)
        self._sent_ids, self._sent_places = ids[order][is_sent].sort()
        self._ids = ids
        self._version = torch.empty_like(versions)
        self._version[order] = versions

    @override
    def version(self, ids: Ids) -> Tensor:
        return self._version[_places(self._ids, ids)]

    @override
    def span(self, ids: Ids) -> None:
        """Return None: rows that were received are not those of a whole table."""

    @override
    def read(self, ids: Ids, out: SomeRows | None = None) -> SomeRows:
        """Return rows as received, in the transfer dtype; see `RowStore.read`."""
        places = self._sent_places[_places(self._sent_ids, ids)]
        if out is None:
            return self._sent[places]
        return torch.index_select(self._sent, 0, places, out=out)


def _places(ascending: Ids, ids: Ids) -> Ids:
    """Return where `ids` are in a tensor that has them all."""
    places = torch.searchsorted(ascending, ids)
    assert torch.equal(ascending[places], ids), "rows were not fetched"
    return places


class DividedRows(Rows):
    """Rows of one block of which this process has a share.

    Args:
        store: the share of this process, in host memory.
        division: which process has which rows.
        received: the rows of all, as they are received.
        device_side: the rows of `received` on the device.
    """

    division: Division

    def __init__(
        self,
        store: RowStore,
        division: Division,
        received: Received,
        device_side: OffloadedRows,
    ) -> None:
        self.store = store
        self.division = division
        self.is_settled = False
        self.live = None
        self.owner = None
        self.gathered: dict[str, Any] | None = None
        """What `meft.gathered_rows` has gathered; None outside of it."""
        self._received = received
        self._device_side = device_side
        self._mean = HostGradient(store)
        self._new: list[tuple[Ids, SomeRows]] = []
        """What this process has added since the last `reduce`."""

    @property
    def engine(self) -> Engine:
        """Return the device side of all blocks."""
        return self._device_side.engine

    def whole(self) -> Tensor:
        """Return the rows of all processes, which have been gathered.

        Returns:
            `rows width`; without values (device `meta`) in all but the first process.

        Raises:
            UnsupportedCallError: they have not been gathered.
        """
        if self.gathered is None:
            raise UnsupportedCallError(
                f"this process has one of {self.division.size} shares of the rows of "
                "sparse adapters: save or read all of them inside of `with "
                "meft.gathered_rows(model):`, which all processes enter"
            )
        rows: Tensor | None = self.gathered["rows"]
        if rows is None:
            shape = self.division.num_rows, self.store.width
            rows = torch.empty(shape, device="meta")
        return rows

    @override
    def begin_batch(self, device: torch.device) -> None:
        self._device_side.begin_batch(device)

    @override
    def chosen(self, flags: Tensor, *, is_there: bool = False) -> Callable[[], Ids]:
        return self._device_side.chosen(flags, is_there=is_there)

    @override
    def choose(self, tokens: Tokens, k: int) -> Callable[[], tuple[Kept, Kept]]:
        raise AssertionError("refused by `divide`: a router chooses")

    @override
    def expect(self, ids: Callable[[], Ids]) -> None:
        """Do nothing, as all processes fetch rows at the same time."""

    @override
    def prepare(self, ids: Ids) -> None:
        for block in self.engine.blocks:  # only one is between `prepare` and `take`
            assert isinstance(block.store, Received)
            block.store.forget()
        cache = self.engine.cache
        slots = torch.from_numpy(cache.find(self.division.block, ids.numpy()))
        known = torch.full_like(slots, -1)
        is_here = slots >= 0
        known[is_here] = torch.from_numpy(cache.version)[slots[is_here]]
        self._received.fetch(ids, known)

    @override
    def take(self, ids: Ids) -> SomeRows:
        return self._device_side.take(ids)

    @override
    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        sent = gradient.to(self.store.transfer_dtype)
        side = self._device_side
        self._new.append((ids, side.engine.download(sent, side.tag()).get()))

    @override
    def reduce(self) -> None:
        division, new = self.division, self._new
        ids = torch.cat([torch.zeros(0, dtype=torch.long), *(i for i, _ in new)])
        of_each = division.of_each(ids)
        order = torch.cat(of_each)
        to_each = [len(some) for some in of_each]
        from_each = division.announce(dividing.GRADIENT, to_each)
        empty = torch.zeros(0, self.store.width, dtype=self.store.transfer_dtype)
        values = torch.cat([empty, *(part for _, part in new)])[order]
        self._new = []
        call = dividing.GRADIENT
        added_ids = division.exchange(ids[order], to_each, from_each, call)
        added = division.exchange(values, to_each, from_each, call)
        mean = _mean(
            self._mean,
            (added_ids // division.size).split(from_each),
            added.split(from_each),
        )
        if mean is not None:
            self.replace_gradient(*mean)

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, found = torch.zeros(0, dtype=torch.long), self.store.rows[:0]
        if self._mean:
            ids = self._mean.ids
            found = self._mean.values.to(self.store.transfer_dtype).float()
        return lambda: (ids, found)

    @override
    def step(self, ids: Ids, gradient: SomeRows) -> None:
        self.store.step(ids, gradient)

    @override
    def held_ids(self) -> list[Tensor]:
        return [self._mean.ids] if self._mean else []

    @override
    def parts(self) -> list[Tensor]:
        return [self._mean.values] if self._mean else []

    @override
    def put_parts(self, parts: list[Tensor]) -> None:
        for part in parts:
            self._mean.put(part)

    @override
    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device)

    @override
    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self._mean.drop()
        self._mean.add(ids.numpy(), gradient)

    @override
    def drop_gradient(self) -> None:
        self._mean.drop()
        self._new = []

    @override
    def on_device(self) -> list[Tensor]:
        return self._device_side.on_device()

    @override
    def end_step(self) -> None:
        self._device_side.end_step()

    @override
    def invalidate(self) -> None:
        """Do nothing, as the version of a row changes with it in all processes."""


def _mean(
    before: HostGradient, ids: Sequence[Ids], added: Sequence[SomeRows]
) -> tuple[Ids, SomeRows] | None:
    """Return the mean gradient of the rows of this process; None if none has one.

    Args:
        before: the mean gradient of earlier backward passes.
        ids: the rows, per process, that it adds to, as indices of the store.
        added: what it adds, in the order in which it does.
    """
    flags = torch.from_numpy(before.has_gradient).clone()
    for some in ids:
        flags[some] = True
    union = flags.nonzero()[:, 0]
    if not len(union):
        return None
    places = flags.cumsum(0) - 1
    start = torch.zeros(len(union), added[0].shape[1])
    if before:
        start[places[before.ids]] = before.values
    parts = (
        start.clone().index_add_(0, places[some], part.float())
        for some, part in zip(ids, added, strict=True)
    )
    total = next(parts)
    for part in parts:
        total += part
    return union, total.div_(len(ids))


def divide(
    stores: Sequence[RowStore], divisions: Sequence[Division], config: SparseConfig
) -> list[DividedRows]:
    """Return the rows of all blocks, of which this process has shares.

    Args:
        stores: the share of this process, per block.
        divisions: which process has which rows, per block.
        config: the cache of the rows.
    """
    tables = [*map(Received, stores, divisions)]
    engine = Engine([*tables], _reading_only(config, tables), OffloadedRows)
    sides = [side for side in engine.blocks if isinstance(side, OffloadedRows)]
    return [*map(DividedRows, stores, divisions, tables, sides)]


def _reading_only(config: SparseConfig, tables: Sequence[RowStore]) -> SparseConfig:
    """Return a config of an engine that keeps no gradients and fetches nothing ahead.

    Gradients leave after each backward pass, and rows are fetched by all processes at
    the same time.
    """
    first = tables[0]
    row_bytes = first.width * first.transfer_dtype.itemsize
    num_rows = sum(map(len, tables))
    slots = slots_for(config, num_rows, first.width, first.transfer_dtype).rows
    budget = -(-slots * row_bytes * 8 // 7) if slots else config.device_bytes
    return dataclasses.replace(config, prefetch=False, device_bytes=budget)
