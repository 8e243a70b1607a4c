"""Rows that live in host memory and visit the device.

    take(ids):  rows in the cache, unchanged since they were fetched: from there
                all others: gathered on the host, one upload, kept if there is room
    gradients:  of rows in the cache: summed there, one download a step
                of all others: one download a batch, summed on the host

Weights change only at the optimizer step, so a row that was fetched once is right for
all the batches whose gradients that step adds up (the accumulation window).

What travels is booked in the ledger under the block and the phase: rows, gradients, and
the numbers that say which (int32 to the device, one byte a flag to the host).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from meft.sparse.cache import Longs, RowCache
from meft.sparse.config import SparseConfig
from meft.sparse.rows import Rows, SomeRows, Tokens, add_rows, choose, size
from meft.sparse.store import Ids, RowStore, Width
from meft.transfer import Copy, Ledger, Link, Trip


class Engine:
    """The device side of all blocks' rows: the cache, and the link to the host."""

    def __init__(self, stores: list[RowStore], config: SparseConfig) -> None:
        self.config = config
        self.ledger = Ledger()
        self.link = Link(torch.device("cpu"), self.ledger)
        first = stores[0]
        row_bytes = first.width * (first.wire_dtype.itemsize + 4)
        budget = config.device_bytes * 7 // 8 if config.cache != "off" else 0
        num_slots = min(budget // row_bytes, len(stores) * len(first))
        self.cache = RowCache(len(stores), len(first), num_slots)
        self._num_slots = num_slots
        self._slabs: tuple[Tensor, Tensor] | None = None
        self.blocks = [
            OffloadedRows(self, index, store) for index, store in enumerate(stores)
        ]
        self.peak_staging_bytes = 0
        """The most that was on its way in one copy."""
        self.num_taken, self.num_hits, self.num_prefetched = 0, 0, 0
        """Rows asked for; of these found in the cache; and fetched ahead of time."""

    @property
    def slabs(self) -> tuple[Tensor, Tensor]:
        """Slots for rows, and for their gradients."""
        if self._slabs is None:
            store = self.blocks[0].store
            shape = (self._num_slots, store.width)
            self._slabs = (
                torch.zeros(shape, dtype=store.wire_dtype, device=self.link.device),
                torch.zeros(shape, device=self.link.device),
            )
        return self._slabs

    def reset_counters(self) -> None:
        """Count from nothing again."""
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

    def upload(self, tensor: Tensor, trip: Trip) -> Copy:
        """Start a copy to the device."""
        self.peak_staging_bytes = max(self.peak_staging_bytes, tensor.nbytes)
        return self.link.upload(tensor, trip)

    def download(self, tensor: Tensor, trip: Trip) -> Copy:
        """Start a copy to the host."""
        self.peak_staging_bytes = max(self.peak_staging_bytes, tensor.nbytes)
        return self.link.download(tensor, trip)

    def prefetch(self, block: int) -> None:
        """Fetch what `block` used last time, if the cache has room for it."""
        if self.config.prefetch and 0 <= block < len(self.blocks):
            self.blocks[block].prefetch()


class OffloadedRows(Rows):
    """Rows of one block that live in host memory."""

    def __init__(self, engine: Engine, block: int, store: RowStore) -> None:
        self.store = store
        self.engine = engine
        self.block = block
        self._last_taken: Longs = np.zeros(0, np.int64)
        self._on_its_way: tuple[Copy, Copy] | None = None
        self._host_gradient: Tensor | None = None
        self._square = torch.zeros((), dtype=torch.double)
        self._host_square = torch.zeros((), dtype=torch.double)
        self._on_host = np.zeros(len(store), bool)

    @override
    def begin_batch(self, device: torch.device) -> None:
        self.engine.use(device)
        self._square = self._square.to(device)
        self.engine.cache.begin_round(self.block)

    def leave_device(self) -> None:
        """Another device is about to be used: bring home what is only there."""
        ids, slots = self.engine.cache.with_gradient(self.block)
        self._on_its_way = None
        if len(ids):
            there = self.engine.slabs[1][self._places(slots)]
            self._square.zero_()
            self._add_on_host(ids, self.engine.download(there, self.trip()).get())

    @override
    def chosen(self, flags: Tensor) -> Ids:
        here = self.engine.download(flags, self.trip()).get()
        return here.nonzero()[:, 0]

    @override
    def choose(self, tokens: Tokens, k: int) -> Tensor:
        trip = self.trip()
        dtype = self.store.wire_dtype
        here = self.engine.download(tokens.to(dtype), trip).get()
        ids = choose(self.store, here, k)
        return self.engine.upload(ids.int(), trip).get().long()

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
        self._last_taken = wanted
        if fresh.all() and len(wanted):
            taken = engine.slabs[0].index_select(0, self._places(slots))
        else:
            taken = self._fetch(wanted, slots, version, fresh)
        step = 1 if self.trip().phase == "forward" else -1
        engine.prefetch(self.block + step)
        return taken

    @override
    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        cache = self.engine.cache
        wanted = ids.numpy()
        slots = cache.find(self.block, wanted)
        away = (slots < 0) | self._on_host[wanted]
        if not away.any():
            self._add_on_device(slots, gradient)
            return
        if not away.all():
            stay = self._places((~away).nonzero()[0])
            self._add_on_device(slots[~away], gradient[stay])
            gradient = gradient[self._places(away.nonzero()[0])]
        sent = gradient.to(self.store.wire_dtype)
        self._add_on_host(wanted[away], self.engine.download(sent, self.trip()).get())

    @override
    def norm(self) -> Tensor:
        if not self._on_host.any():
            return size(self._square)
        away = self.engine.upload(self._host_square, self.trip()).get()
        return size(self._square + away)

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, slots = self.engine.cache.with_gradient(self.block)
        coming = None
        if len(ids):
            sums = self.engine.slabs[1][self._places(slots, "update")]
            sent = sums.to(self.store.wire_dtype)
            coming = self.engine.download(sent, self.trip("update"))

        def get() -> tuple[Ids, SomeRows]:
            parts = []
            if coming is not None:
                parts.append((torch.from_numpy(ids), coming.get().float()))
            if self._host_gradient is not None and self._on_host.any():
                away = torch.from_numpy(self._on_host.nonzero()[0])
                parts.append((away, self._host_gradient[away]))
            if not parts:
                return torch.zeros(0, dtype=torch.long), self.store.rows[:0]
            if len(parts) == 1:
                return parts[0]
            return torch.cat([i for i, _ in parts]), torch.cat([g for _, g in parts])

        return get

    @override
    def at_home(self, number: Tensor) -> Tensor:
        return self.engine.download(number, self.trip("update")).get()

    @override
    def scale_gradient(self, factor: Tensor) -> None:
        _, slots = self.engine.cache.with_gradient(self.block)
        self._square *= factor * factor
        if len(slots):
            self.engine.slabs[1][self._places(slots, "update")] *= factor
        if self._host_gradient is not None:
            here = self.engine.download(factor, self.trip()).get()
            self._host_gradient *= here
            self._host_square *= here * here

    @override
    def drop_gradient(self) -> None:
        _, slots = self.engine.cache.with_gradient(self.block)
        self._square.zero_()
        self._host_square.zero_()
        if len(slots):
            self.engine.slabs[1][self._places(slots, "update")] = 0
            self.engine.cache.has_gradient[slots] = False
        if self._host_gradient is not None:
            self._host_gradient[torch.from_numpy(self._on_host.nonzero()[0])] = 0
            self._on_host.fill(False)

    @override
    def on_device(self) -> list[Tensor]:
        return list(self.engine.slabs) if self.block == 0 else []

    @override
    def end_step(self) -> None:
        if self.engine.config.cache == "window":
            self.engine.cache.clear()

    @override
    def forget(self) -> None:
        self.drop_gradient()
        self._on_its_way = None
        self.engine.cache.clear()

    def prefetch(self) -> None:
        """Fetch what was used last time and is not here, as far as there is room."""
        cache = self.engine.cache
        ids = self._last_taken
        if self._on_its_way is not None or not len(ids):
            return
        version = self.store.version(torch.from_numpy(ids)).numpy()
        slots = cache.find(self.block, ids)
        stale = slots < 0
        stale[~stale] = cache.version[slots[~stale]] != version[~stale]
        kept = self._keep(ids, slots, version, stale)
        if not kept.any():
            return
        rows = self.store.read(torch.from_numpy(ids[kept]))
        self.engine.num_prefetched += len(rows)
        trip = self.trip()
        self._on_its_way = (
            self.engine.upload(rows, trip),
            self.engine.upload(torch.from_numpy(slots[kept]).int(), trip),
        )

    def _land(self) -> None:
        """Put what was fetched ahead into its slots."""
        if self._on_its_way is not None:
            rows, places = (copy.get() for copy in self._on_its_way)
            self.engine.slabs[0].index_copy_(0, places.long(), rows)
            self._on_its_way = None

    def _fetch(
        self, wanted: Longs, slots: Longs, version: Longs, fresh: np.ndarray
    ) -> Width:
        """Rows of which at least one has to come from the host."""
        missing = self.store.read(torch.from_numpy(wanted[~fresh]))
        rows = self.engine.upload(missing, self.trip()).get()
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

    def _keep(
        self, ids: Longs, slots: Longs, version: Longs, stale: np.ndarray
    ) -> np.ndarray:
        """Which stale rows get a slot, written into `slots`."""
        cache = self.engine.cache
        absent = slots < 0
        slots[absent] = cache.admit(self.block, ids[absent])
        kept = stale & (slots >= 0)
        cache.version[slots[kept]] = version[kept]
        return kept

    def _add_on_device(self, slots: Longs, gradient: Width) -> None:
        sums = self.engine.slabs[1]
        self._square += add_rows(sums, self._places(slots), gradient)
        self.engine.cache.has_gradient[slots] = True

    def _add_on_host(self, ids: Longs, gradient: Width) -> None:
        if self._host_gradient is None:
            self._host_gradient = torch.zeros_like(self.store.rows)
        places = torch.from_numpy(ids)
        self._host_square += add_rows(self._host_gradient, places, gradient.float())
        self._on_host[ids] = True

    def _places(self, places: Longs, phase: str | None = None) -> Tensor:
        """Numbers that the device needs to know."""
        numbers = torch.from_numpy(places.astype(np.int32))
        return self.engine.upload(numbers, self.trip(phase)).get().long()

    def trip(self, phase: str | None = None) -> Trip:
        """What this block's copies are booked under, by default in this phase."""
        if phase is None:
            phase = "backward" if in_backward() else "forward"
        return Trip(place=f"block {self.block}", phase=phase)


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
