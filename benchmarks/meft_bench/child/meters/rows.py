"""Rows that sparse adapters transfer and hold, counted by the library's own ledger.

    moved     bytes between host and device in one optimizer step, every copy counted
              where it is made; on a CPU the same copies between two places in memory
    paper     the paper's accounting for the same batches: per block and batch, the
              rows that the batch activates to the device, their gradients to the
              host, and the hidden states to the host: (4 d u + T d) elements (Hao et
              al., section 3.3)
    dense     transfers of an adapter with as many neurons that is offloaded entirely:
              all rows and all gradients in every batch, 2 * 2 d r elements a block

d is the width, u the number of neurons that a batch activates, T its number of tokens,
r the number of all neurons. The three quantities are in bytes, with elements of the
same size.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meft.sparse.adapter import SparseAdapter
from meft.sparse.divided_rows import DividedRows
from meft.sparse.engine import Engine
from meft.sparse.offloaded_rows import OffloadedRows


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTraffic:
    """Traffic of one optimizer step: fields of `Measurement`.

    Fields that only an engine counts are None without one.
    """

    paper_transfer_bytes: int
    dense_transfer_bytes: int
    union_fraction: list[float]
    """Share of a block's neurons that a batch activates; mean over batches."""
    row_store_bytes: int
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    h2d_forward_bytes: list[int] | None = None
    h2d_backward_bytes: list[int] | None = None
    h2d_update_bytes: list[int] | None = None
    d2h_forward_bytes: list[int] | None = None
    d2h_backward_bytes: list[int] | None = None
    d2h_update_bytes: list[int] | None = None
    """The last six are lists over blocks, lowest first."""
    cache_hit_fraction: float | None = None
    num_prefetched_rows: int | None = None
    row_device_bytes: int | None = None
    peak_staging_bytes: int | None = None


class TrafficMeter:
    """Count the traffic of adapters from the creation of this object on."""

    def __init__(self, adapters: Sequence[SparseAdapter]) -> None:
        self._adapters = adapters
        first = adapters[0].rows
        self._engine: Engine | None = None
        if isinstance(first, OffloadedRows | DividedRows):
            self._engine = first.engine
        for adapter in adapters:
            adapter.counts.clear()
        if self._engine is not None:
            self._engine.reset_counters()

    def result(self) -> RowTraffic:
        """Return the counts so far."""
        seen = [adapter.counts for adapter in self._adapters]
        store = self._adapters[0].rows.store
        itemsize = store.transfer_dtype.itemsize
        hidden = store.width // 2
        num_batches = seen[0].num_batches
        active = sum(one.total_active for one in seen)
        tokens = sum(one.total_tokens for one in seen)
        per_block = self._adapters[0].config.num_neurons
        neurons = len(seen) * per_block * num_batches
        found = RowTraffic(
            paper_transfer_bytes=(4 * active + tokens) * hidden * itemsize,
            dense_transfer_bytes=4 * neurons * hidden * itemsize,
            union_fraction=[
                one.total_active / (num_batches * per_block) for one in seen
            ],
            row_store_bytes=sum(a.rows.store.nbytes for a in self._adapters),
        )
        engine = self._engine
        if engine is None:
            return found
        return dataclasses.replace(
            found,
            h2d_bytes=engine.ledger.h2d_bytes,
            d2h_bytes=engine.ledger.d2h_bytes,
            **_by_block(engine),
            cache_hit_fraction=engine.num_hits / max(engine.num_taken, 1),
            num_prefetched_rows=engine.num_prefetched,
            row_device_bytes=sum(slab.nbytes for slab in engine.slabs),
            peak_staging_bytes=engine.peak_staging_bytes,
        )


def _by_block(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ledger = engine.ledger
    for direction, booked in (("h2d", ledger.h2d), ("d2h", ledger.d2h)):
        for phase in ("forward", "backward", "update"):
            found[f"{direction}_{phase}_bytes"] = [
                booked[block.tag(phase)]
                for block in engine.blocks
                if isinstance(block, OffloadedRows)
            ]
    return found
