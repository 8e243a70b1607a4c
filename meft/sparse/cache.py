"""Which rows, and which gradients of rows, are on the device, and in which slots.

Rows and gradients have slots of their own, so that a row that is only read takes no
room for a gradient. Rows of all blocks share a fixed number of slots. Blocks run in
turn, so the row used longest ago is the next one needed, and an LRU policy would evict
every row just before its use. Here a new row takes a free slot or the slot of a row
that its own block has not used for two rounds; otherwise it is not cached.
"""

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


class RowCache:
    """Assign slots to rows.

    Args:
        num_blocks: number of blocks that share the slots.
        rows_per_block: number of neurons of each block.
        num_slots: number of rows that fit.
    """

    def __init__(self, num_blocks: int, rows_per_block: int, num_slots: int) -> None:
        self._rows_per_block = rows_per_block
        self._slot_of = np.full(num_blocks * rows_per_block, -1, np.int64)
        self._row_of = np.full(num_slots, -1, np.int64)
        self._free = np.arange(num_slots)[::-1]
        self._used_in = np.zeros(num_slots, np.int64)
        self.version = np.zeros(num_slots, np.int64)
        """Value of `RowStore.version` when the row was fetched."""
        self._round = np.zeros(num_blocks, np.int64)

    def begin_round(self, block: int) -> None:
        """Record that the block starts on another batch."""
        self._round[block] += 1

    def find(self, block: int, ids: Longs) -> Longs:
        """Return the slots of a block's rows, -1 for rows that are not cached."""
        slots = self.slots_of(block, ids)
        self._used_in[slots[slots >= 0]] = self._round[block]
        return slots

    def slots_of(self, block: int, ids: Longs) -> Longs:
        """Return the same without a note that the rows are used."""
        slots: Longs = self._slot_of[block * self._rows_per_block + ids]
        return slots

    def admit(self, block: int, ids: Longs) -> Longs:
        """Assign slots to rows that are not cached, -1 to those that stay uncached."""
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
        """Evict every row."""
        self._slot_of.fill(-1)
        self._row_of.fill(-1)
        self._free = np.arange(len(self._row_of))[::-1]

    def invalidate(self, block: int) -> None:
        """Mark all rows of a block as outdated."""
        first = block * self._rows_per_block
        slots = self._slot_of[first : first + self._rows_per_block]
        self.version[slots[slots >= 0]] = -1

    def _old(self) -> Longs:
        """Return slots of rows that may be evicted; called when no slot is free."""
        owner = self._row_of // self._rows_per_block
        old = self._used_in < self._round[owner] - 1
        found: Longs = (old & (self._row_of >= 0)).nonzero()[0]
        return found


class GradientSlots:
    """Assign slots to gradients, which keep them until they are cleared.

    Args:
        num_blocks: number of blocks that share the slots.
        rows_per_block: number of neurons of each block.
        num_slots: number of gradients that fit.
    """

    def __init__(self, num_blocks: int, rows_per_block: int, num_slots: int) -> None:
        self._slot_of = np.full((num_blocks, rows_per_block), -1, np.int64)
        self._free = np.arange(num_slots)[::-1]

    def held(self, block: int) -> tuple[Longs, Longs]:
        """Return a block's rows with a gradient here, ascending, and their slots."""
        slots = self._slot_of[block]
        ids = (slots >= 0).nonzero()[0]
        return ids, slots[ids]

    def assign(self, block: int, ids: Longs, may_be_new: Flags) -> Longs:
        """Return the slots of gradients, -1 for those that have none.

        Args:
            block: the block.
            ids: indices of its rows, ascending.
            may_be_new: which of them get a slot, if there is room and they have none.
        """
        slots: Longs = self._slot_of[block, ids]
        new = ((slots < 0) & may_be_new).nonzero()[0][: len(self._free)]
        if len(new):
            slots[new] = self._free[::-1][: len(new)]
            self._free = self._free[: len(self._free) - len(new)]
            self._slot_of[block, ids[new]] = slots[new]
        return slots

    def release(self, block: int) -> None:
        """Free the slots of a block."""
        _, slots = self.held(block)
        self._slot_of[block] = -1
        self._free = np.concatenate([self._free, slots[::-1]])
