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

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meft.errors import AdapterFileError, ConfigError, UnsupportedCallError
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
    slots, _ = slots_for(config, num_rows, first.width, first.transfer_dtype)
    budget = -(-slots * row_bytes * 8 // 7) if slots else config.device_bytes
    return dataclasses.replace(config, prefetch=False, device_bytes=budget)


@contextlib.contextmanager
def names_only(every: Iterable[Rows]) -> Iterator[None]:
    """Run the body with `whole` rows without values, where none were gathered.

    The body uses names and shapes of a state dict and reads no values.
    """
    divided = [rows for rows in every if isinstance(rows, DividedRows)]
    closed = [rows for rows in divided if rows.gathered is None]
    for rows in closed:
        rows.gathered = {"rows": None}
    try:
        yield
    finally:
        for rows in closed:
            rows.gathered = None


_BY_ROW = ("first", "second", "updated_at", "factors")
"""Tensors of a store's state that have an entry for each of its rows."""


def gather(rows: DividedRows, *, optimizer_state: bool) -> dict[str, Any]:
    """Return the rows of all processes, and their state, in the first process.

    All processes call it. The values are None in all but the first.

    Args:
        rows: the share of this process.
        optimizer_state: whether to gather what `RowStore.state` returns, too.
    """
    division = rows.division
    found: dict[str, Any] = {"rows": division.gather_rows(rows.store.settled())}
    if not optimizer_state:
        return found
    state = rows.store.state()
    behind = torch.zeros(len(rows.store), dtype=torch.bool)
    behind[state["behind"]] = True
    at_last = torch.zeros_like(rows.store.rows)
    at_last[state["behind"]] = state["at_last"]
    of_rows = {name: state[name] for name in _BY_ROW}
    of_rows |= {"behind": behind, "at_last": at_last}
    whole: dict[str, Any] = {
        name: division.gather_rows(tensor, dividing.STATE)
        for name, tensor in of_rows.items()
    }
    if division.rank == 0:
        whole["behind"] = whole["behind"].nonzero()[:, 0]
        whole["at_last"] = whole["at_last"][whole["behind"]]
        found["state"] = {**state, **whole}
    return found


def state_of(rows: Rows) -> dict[str, Any]:
    """Return the state of rows for an optimizer's `state_dict()`.

    Of divided rows it is that of all where it was gathered, and that of the share
    elsewhere.
    """
    if not isinstance(rows, DividedRows):
        return rows.store.state()
    whole: dict[str, Any] | None = (rows.gathered or {}).get("state")
    if whole is not None:
        return whole
    return {**rows.store.state(), "share": (rows.division.rank, rows.division.size)}


def own_state(rows: Rows, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a saved state that belongs to the rows of this process.

    Args:
        rows: the rows.
        state: what `state_of` returned in this or another process.

    Raises:
        ConfigError: it is the state of a share, and not of this one, or of another
            number of rows.
    """
    division = rows.division
    mine = None if division is None else (division.rank, division.size)
    share = state.get("share")
    if share is not None and tuple(share) != mine:
        here = "all rows" if mine is None else f"share {mine[0]} of {mine[1]}"
        raise ConfigError(
            f"the state is that of share {share[0]} of {share[1]} of divided rows, but "
            f"this process has {here}: call `state_dict()` of the optimizer inside of "
            "`with meft.gathered_rows(model, optimizer_state=True):` to save a state "
            "that any number of processes can load"
        )
    is_old = not state.keys() >= {*_BY_ROW}  # which the store refuses
    if division is None or share is not None or is_old:
        return state
    num_rows = len(state["first"])
    if num_rows != division.num_rows:
        raise ConfigError(
            f"the state is of {num_rows} rows, but this model's blocks have "
            f"{division.num_rows}, divided among {division.size} processes"
        )
    mine_of_behind = division.of_each(state["behind"])[division.rank]
    return {
        **state,
        **{name: division.share(state[name]) for name in _BY_ROW},
        "behind": state["behind"][mine_of_behind] // division.size,
        "at_last": state["at_last"][mine_of_behind],
    }


def own_rows(rows: Rows, whole: Tensor) -> Tensor:
    """Return those of saved rows that this process has.

    Args:
        rows: the rows.
        whole: saved rows of all processes, `rows width`.

    Raises:
        AdapterFileError: they are of another number of rows, of which this process
            would not notice if it had as many.
    """
    division = rows.division
    if division is None:
        return whole
    if len(whole) != division.num_rows:
        raise AdapterFileError(
            f"{len(whole)} rows were saved, but this model's blocks have "
            f"{division.num_rows}, divided among {division.size} processes: load them "
            "into a model with as many `num_neurons`"
        )
    return division.share(whole)
