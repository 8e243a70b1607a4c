"""Which rows are on the device, and where: the books of a row cache.

Rows of all blocks share a fixed number of slots. Blocks are run through in turn, so
what was used longest ago is what is needed next, and the usual rule of throwing it out
would throw everything out just before its use. Here a newcomer takes a free slot or the
slot of a row that its own block has not used for two rounds; otherwise it stays out.
"""

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


class RowCache:
    """Slots for rows.

    Args:
        num_blocks: blocks that share the slots.
        rows_per_block: neurons of each.
        num_slots: rows that fit.
    """

    def __init__(self, num_blocks: int, rows_per_block: int, num_slots: int) -> None:
        self._rows_per_block = rows_per_block
        self._slot_of = np.full(num_blocks * rows_per_block, -1, np.int64)
        self._row_of = np.full(num_slots, -1, np.int64)
        self._free = np.arange(num_slots)[::-1]
        self._used_in = np.zeros(num_slots, np.int64)
        self.version = np.zeros(num_slots, np.int64)
        """What `RowStore.version` said when the row was fetched."""
        self.has_gradient: Flags = np.zeros(num_slots, bool)
        """Rows whose gradient waits in their slot; these are never thrown out."""
        self._round = np.zeros(num_blocks, np.int64)

    def begin_round(self, block: int) -> None:
        """The block starts on another batch."""
        self._round[block] += 1

    def find(self, block: int, ids: Longs) -> Longs:
        """The slots of a block's rows, -1 for those that are not here."""
        slots = self._slot_of[block * self._rows_per_block + ids]
        self._used_in[slots[slots >= 0]] = self._round[block]
        return slots

    def admit(self, block: int, ids: Longs) -> Longs:
        """Slots for rows that are not here, -1 for those that must stay out."""
        slots = np.full(len(ids), -1, np.int64)
        if not len(ids):
            return slots
        places = self._free[::-1][: len(ids)]
        self._free = self._free[: len(self._free) - len(places)]
        if len(places) < len(ids):
            old = self._old()[: len(ids) - len(places)]
            self._slot_of[self._row_of[old]] = -1
            places = np.concatenate([places, old])
        slots[: len(places)] = places
        rows = block * self._rows_per_block + ids[: len(places)]
        self._row_of[places] = rows
        self._slot_of[rows] = places
        self._used_in[places] = self._round[block]
        return slots

    def clear(self) -> None:
        """Throw out every row but those whose gradient waits in their slot."""
        gone = (self._row_of >= 0) & ~self.has_gradient
        self._slot_of[self._row_of[gone]] = -1
        self._row_of[gone] = -1
        self._free = (self._row_of < 0).nonzero()[0][::-1]

    def invalidate(self, block: int) -> None:
        """No row of a block is up to date any more; gradients stay."""
        first = block * self._rows_per_block
        slots = self._slot_of[first : first + self._rows_per_block]
        self.version[slots[slots >= 0]] = -1

    def with_gradient(self, block: int) -> tuple[Longs, Longs]:
        """Rows of a block whose gradient waits here, ascending, and their slots."""
        first = block * self._rows_per_block
        slots = self._slot_of[first : first + self._rows_per_block]
        ids = (slots >= 0).nonzero()[0]
        ids = ids[self.has_gradient[slots[ids]]]
        return ids, slots[ids]

    def _old(self) -> Longs:
        """Slots of rows that may be thrown out; asked for when no slot is free."""
        owner = self._row_of // self._rows_per_block
        old = self._used_in < self._round[owner] - 1
        found: Longs = (old & ~self.has_gradient & (self._row_of >= 0)).nonzero()[0]
        return found
