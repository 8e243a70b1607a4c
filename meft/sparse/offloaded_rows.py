"""Rows that are stored in host memory and copied to the device for computation.

    take(ids):  cached rows that have not changed since they were fetched: read from
                the cache; all others: gathered on the host, one upload, kept if there
                is room
    gradients:  summed in slots of their own, one download per step; they stay until
                they are cleared, and clipping and scaling change them in place;
                those without a slot: one download per batch, summed on the host

Weights change only at the optimizer step, so a row that was fetched once is valid for
all batches whose gradients that step adds up (the accumulation window).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from meft.sparse.cache import Flags, Longs
from meft.sparse.config import SparseConfig
from meft.sparse.engine import Engine, EngineRows
from meft.sparse.host_gradient import HostGradient
from meft.sparse.indices import ids_of
from meft.sparse.rows import Kept, Tokens, choose
from meft.sparse.shapes import Ids, SomeRows
from meft.sparse.store import RowStore
from meft.transfer import PendingCopy, TransferTag
from meft.transforms import in_backward


def offload(stores: list[RowStore], config: SparseConfig) -> Engine:
    """Return an engine for the rows of all blocks, which move to host memory."""
    return Engine(stores, config, OffloadedRows)


class Prefetched(NamedTuple):
    """Rows that are fetched before they are asked for."""

    rows: Callable[[], SomeRows]
    places: PendingCopy
    """Their slots, on the device."""
    ids: Longs
    """Their indices."""
    slots: Longs
    """The same slots, on the host."""


class OffloadedRows(EngineRows):
    """Rows of one block that are stored in host memory."""

    division = None

    def __init__(self, engine: Engine, block: int, store: RowStore) -> None:
        self.store = store
        self.engine = engine
        self.block = block
        self._last_taken: Longs = np.zeros(0, np.int64)
        self._expected: Callable[[], Ids] | None = None
        self._on_its_way: Prefetched | None = None
        self._host_gradient = HostGradient(store)
        self._gradient_places: Tensor | None = None
        """Slots of the gradients on the device, if transferred already."""
        self.is_settled = False
        self.live = None
        self.owner = None

    def __reduce__(self) -> Any:
        """Reduce to a reference to the engine: see `Engine.__reduce__`."""
        return _block_of, (self.engine, self.block)

    @override
    def begin_batch(self, device: torch.device) -> None:
        self.engine.use(device)
        self.engine.cache.begin_round(self.block)

    def leave_device(self) -> None:
        """Download the gradients that are only on the device, before it is changed."""
        ids, slots = self.engine.gradients.held(self.block)
        self._on_its_way = None
        self.store.wait_for_upload()
        self.engine.home.recall(self.block)
        if len(ids):
            there = self.engine.slabs[1][self._places(slots)]
            gradient = self.engine.download(there, self.tag()).get()
            self._host_gradient.add(ids, gradient)
            self.engine.gradients.release(self.block)
            self._gradient_places = None

    @override
    def chosen(self, flags: Tensor, *, is_there: bool = False) -> Callable[[], Ids]:
        if is_there:
            return functools.cache(lambda: ids_of(flags))
        coming = self.engine.download(flags, self.tag())
        return functools.cache(lambda: ids_of(coming.get()))

    @override
    def choose(self, tokens: Tokens, k: int) -> Callable[[], tuple[Kept, Kept]]:
        tag = self.tag()
        if k == len(self.store):  # all are kept, whatever their scores
            kept = torch.arange(k, device=tokens.device).expand(len(tokens), k)
            return lambda: (kept, torch.arange(k)[None])
        coming = self.engine.download(tokens.to(self.store.transfer_dtype), tag)

        def get() -> tuple[Kept, Kept]:
            there = choose(self.store, coming.get(), k)
            return self.engine.upload(there.int(), tag).get().long(), there

        return get

    @override
    def expect(self, ids: Callable[[], Ids]) -> None:
        self._expected = ids

    @override
    def prepare(self, ids: Ids) -> None:
        """Do nothing, because all rows are here."""

    @override
    def take(self, ids: Ids) -> SomeRows:
        engine, cache = self.engine, self.engine.cache
        self._land()
        wanted = ids.numpy()
        slots = cache.find(self.block, wanted)
        version = self.store.version(ids).numpy()
        fresh = slots >= 0
        fresh[fresh] = cache.version[slots[fresh]] == version[fresh]
        engine.num_taken += len(wanted)
        engine.num_hits += int(fresh.sum())
        self._last_taken, self._expected = wanted, None
        if fresh.all() and len(wanted):
            taken = engine.slabs[0].index_select(0, self._places(slots))
        else:
            taken = self._fetch(wanted, slots, version, fresh)
        step = 1 if self.tag().phase == "forward" else -1
        engine.prefetch(self.block + step)
        return taken

    @override
    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        wanted = ids.numpy()
        home = self.engine.home.slots
        home.count(self.block, wanted)
        # A sum stays where it was begun.
        is_new = ~self._host_gradient.has_gradient[wanted]
        if len(home):
            is_new &= home.slots_of(self.block, wanted) >= 0
        slots = self.engine.gradients.assign(self.block, wanted, is_new)
        away = slots < 0
        gradient = gradient.to(self.store.transfer_dtype)
        if not away.any():
            self._add_on_device(slots, gradient)
            return
        if not away.all():
            stay = self._places((~away).nonzero()[0])
            self._add_on_device(slots[~away], gradient[stay])
            gradient = gradient[self._places(away.nonzero()[0])]
        coming = self.engine.download(gradient, self.tag())
        self.engine.expect(self._host_gradient)
        self._host_gradient.expect(wanted[away], coming)

    @override
    def reduce(self) -> None:
        """Do nothing, because no other process has some of the gradient."""

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, slots = self.engine.gradients.held(self.block)
        away = ~self._is_at_home(ids)
        coming = None
        if away.any():
            places = self._places_of_gradient(slots)
            if not away.all():
                places = places[self._places(away.nonzero()[0], "update")]
            sent = self.engine.slabs[1][places].to(self.store.transfer_dtype)
            coming = self.engine.download(sent, self.tag("update"))

        def get() -> tuple[Ids, SomeRows]:
            parts = []
            if coming is not None:
                parts.append((torch.from_numpy(ids[away]), coming.get().float()))
            if self._host_gradient:
                mine, values = self._host_gradient.ids, self._host_gradient.values
                away_here = ~self._is_at_home(mine.numpy())
                some = torch.from_numpy(away_here.nonzero()[0])
                values = values[some].to(self.store.transfer_dtype)
                parts.append((mine[some], values.float()))
            if not parts:
                return torch.zeros(0, dtype=torch.long), self.store.rows[:0]
            if len(parts) == 1:
                return parts[0]
            return torch.cat([i for i, _ in parts]), torch.cat([g for _, g in parts])

        return get

    @override
    def step(self, ids: Ids, gradient: SomeRows) -> None:
        self.engine.home.step(
            self.block, ids, gradient, self._gradient_at_home(), self.tag("update")
        )

    def _gradient_at_home(self) -> tuple[Longs, SomeRows]:
        """Return the rows at home that have a gradient, and it, on the device."""
        ids, slots = self.engine.gradients.held(self.block)
        here = self._is_at_home(ids)
        places = self._places(slots[here], "update")
        wire = self.store.transfer_dtype
        found = self.engine.slabs[1][places].to(wire).float()
        if not self._host_gradient:
            return ids[here], found
        mine = self._host_gradient.ids.numpy()
        some = self._is_at_home(mine).nonzero()[0]
        values = self._host_gradient.values[torch.from_numpy(some)].to(wire)
        sent = self.engine.upload(values, self.tag("update")).get().float()
        return np.concatenate([ids[here], mine[some]]), torch.cat([found, sent])

    def _is_at_home(self, ids: Longs) -> Flags:
        return self.engine.home.slots.slots_of(self.block, ids) >= 0

    @override
    def held_ids(self) -> list[Tensor]:
        ids, _ = self.engine.gradients.held(self.block)
        held = [torch.from_numpy(ids)] if len(ids) else []
        return [*held, self._host_gradient.ids] if self._host_gradient else held

    @override
    def parts(self) -> list[Tensor]:
        _, slots = self.engine.gradients.held(self.block)
        found = []
        if len(slots):
            found.append(self.engine.slabs[1][self._places_of_gradient(slots)])
        if self._host_gradient:
            found.append(self._host_gradient.values)
        return found

    @override
    def put_parts(self, parts: list[Tensor]) -> None:
        _, slots = self.engine.gradients.held(self.block)
        rest = iter(parts)
        if len(slots):
            self.engine.slabs[1][self._places_of_gradient(slots)] = next(rest)
        if self._host_gradient:
            self._host_gradient.put(next(rest))

    @override
    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        move = (
            self.engine.upload if tensor.device.type == "cpu" else self.engine.download
        )
        return move(tensor, self.tag("update")).get()

    @override
    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self.drop_gradient()
        self._host_gradient.add(ids.numpy(), gradient)

    @override
    def drop_gradient(self) -> None:
        _, slots = self.engine.gradients.held(self.block)
        if len(slots):
            self.engine.slabs[1].index_fill_(0, self._places_of_gradient(slots), 0)
            self.engine.gradients.release(self.block)
            self._gradient_places = None
        self._host_gradient.drop()

    @override
    def on_device(self) -> list[Tensor]:
        return list(self.engine.slabs) if self.block == 0 else []

    @override
    def end_step(self) -> None:
        if self.engine.config.cache == "window":
            self.engine.cache.clear()
        self.engine.home.exchange()

    @override
    def invalidate(self) -> None:
        self._on_its_way = None
        self.engine.cache.invalidate(self.block)

    def prefetch(self) -> None:
        """Fetch uncached rows that will be used, as far as there is room.

        They are those that are expected, otherwise those that were used last time.
        """
        cache = self.engine.cache
        if self._on_its_way is not None:
            return
        expected = self._expected
        ids = self._last_taken if expected is None else expected().numpy()
        ids = ids[~self._is_at_home(ids)]
        if not len(ids):
            return
        version = self.store.version(torch.from_numpy(ids)).numpy()
        slots = cache.find(self.block, ids)
        stale = slots < 0
        stale[~stale] = cache.version[slots[~stale]] != version[~stale]
        kept = self._keep(ids, slots, version, stale)
        if not kept.any():
            return
        rows = self._send(ids[kept])
        self.engine.num_prefetched += int(kept.sum())
        tag = self.tag()
        self._on_its_way = Prefetched(
            rows=rows,
            places=self.engine.upload(torch.from_numpy(slots[kept]).int(), tag),
            ids=ids[kept],
            slots=slots[kept],
        )

    def _land(self) -> None:
        """Write prefetched rows into their slots, which others may have got since."""
        coming, self._on_its_way = self._on_its_way, None
        if coming is None:
            return
        cache = self.engine.cache
        still = cache.slots_of(self.block, coming.ids) == coming.slots
        if still.all():
            rows, places = coming.rows(), coming.places.get()
            self.engine.slabs[0].index_copy_(0, places.long(), rows)
        else:  # rows that are not written are not up to date
            cache.version[coming.slots[still]] = -1

    def _fetch(
        self, wanted: Longs, slots: Longs, version: Longs, fresh: np.ndarray
    ) -> SomeRows:
        """Return rows of which at least one has to be uploaded from the host.

        Args:
            wanted: the indices of the rows, `some`.
            slots: the slot of each, -1 for rows that are not cached; updated in place.
            version: the current version of each.
            fresh: whether the cached copy of each is up to date.
        """
        rows = self._missing(wanted[~fresh])
        kept = self._keep(wanted, slots, version, ~fresh)
        if kept.any():
            of_missing = kept[~fresh]
            new = (
                rows
                if of_missing.all()
                else rows[self._places(of_missing.nonzero()[0])]
            )
            self.engine.slabs[0].index_copy_(0, self._places(slots[kept]), new)
        if not fresh.any():
            return rows
        taken = rows.new_empty(len(wanted), rows.shape[1])
        found = self.engine.slabs[0].index_select(0, self._places(slots[fresh]))
        taken.index_copy_(0, self._places(fresh.nonzero()[0]), found)
        taken.index_copy_(0, self._places((~fresh).nonzero()[0]), rows)
        return taken

    def _missing(self, ids: Longs) -> SomeRows:
        """Return rows that are not in the cache: of the home, or of the host."""
        here, tag = self._is_at_home(ids), self.tag()
        if not here.any():
            return self._send(ids)()
        self.engine.num_hits += int(here.sum())
        self.engine.home.slots.count(self.block, ids[here])
        found = self.engine.home.read(self.block, ids[here], tag)
        if here.all():
            return found
        rows = found.new_empty(len(ids), found.shape[1])
        sent = self._send(ids[~here])()
        rows.index_copy_(0, self._places(here.nonzero()[0]), found)
        return rows.index_copy_(0, self._places((~here).nonzero()[0]), sent)

    def _send(self, ids: Longs) -> Callable[[], SomeRows]:
        """Start to upload rows from the host; the result returns them on the device.

        Where almost all of a part of the table are wanted, that part is uploaded from
        where it is stored. Otherwise rows are gathered in memory from which they are
        uploaded without another copy.
        """
        store, engine, tag = self.store, self.engine, self.tag()
        engine.home.slots.count(self.block, ids)
        wanted = torch.from_numpy(ids)
        span = store.span(wanted) if len(ids) else None
        if span is None:
            shape = len(ids), store.width
            out = engine.link.staging(shape, store.transfer_dtype)
            return engine.upload(store.read(wanted, out), tag).get
        coming = engine.upload(span, tag)
        store.wait_for_upload = coming.wait
        if len(span) == len(ids):
            return coming.get
        places = self._places(ids - ids[0])
        return lambda: coming.get().index_select(0, places)

    def _keep(
        self, ids: Longs, slots: Longs, version: Longs, stale: np.ndarray
    ) -> np.ndarray:
        """Choose the stale rows that get a slot, and write their slots into `slots`.

        Args:
            ids: the indices of the rows, `some`.
            slots: the slot of each, -1 for rows that are not cached; updated in place.
            version: the current version of each.
            stale: whether each row is missing or outdated in the cache.

        Returns:
            Whether each row is stale and has a slot.
        """
        cache = self.engine.cache
        absent = slots < 0
        slots[absent] = cache.admit(self.block, ids[absent])
        kept = stale & (slots >= 0)
        cache.version[slots[kept]] = version[kept]
        return kept

    def _add_on_device(self, slots: Longs, gradient: SomeRows) -> None:
        self.engine.slabs[1].index_add_(0, self._places(slots), gradient.float())
        self._gradient_places = None

    def _places_of_gradient(self, slots: Longs) -> Tensor:
        if self._gradient_places is None:
            self._gradient_places = self._places(slots, "update")
        return self._gradient_places

    def _places(self, places: Longs, phase: str | None = None) -> Tensor:
        """Upload indices to the device."""
        numbers = torch.from_numpy(places.astype(np.int32))
        return self.engine.upload(numbers, self.tag(phase)).get().long()

    def tag(self, phase: str | None = None) -> TransferTag:
        """Return the ledger key of this block's transfers, by default of this phase."""
        if phase is None:
            phase = "backward" if in_backward() else "forward"
        return TransferTag(place=f"block {self.block}", phase=phase)


def _block_of(engine: Engine, block: int) -> EngineRows:
    return engine.blocks[block]
