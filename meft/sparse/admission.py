"""Which rows are at home on the device: those whose transfers it saves most.

A row at home is not transferred: neither its value, when a batch needs it, nor its
gradient, at the optimizer step. Bringing it there costs p, m and v, 12 bytes a number,
and as much when it leaves. Per row, the number of transfers in which it was or would
have been is counted, and every step all counts fade:

    uses = FADE * uses + (values and gradients in this step)

With a FADE of 1 - 1/H, `uses` estimates the transfers of the next H steps, so that a
row enters a free slot if its uses exceed the cost of the way in, and the slot of the
row at home with the fewest uses if they exceed those by the cost of both ways. (This is
the admission by frequency of TinyLFU, Einziger et al. 2017, with costs in place of its
tie-break, and exact counts in place of a sketch.)
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meft.sparse.cache import Flags, Longs

FADE = 1 - 1 / 32
"""Factor on all counts per optimizer step."""


class Moving(NamedTuple):
    """Rows of one block that leave or enter the home."""

    block: int
    ids: Longs
    """Their indices, ascending."""
    slots: Longs
    """Their slots."""


class HomeSlots:
    """Assign slots to the rows at home.

    Args:
        num_blocks: number of blocks that share the slots.
        rows_per_block: number of neurons of each block.
        num_slots: number of rows that fit.
        cost: the way in or out of a row, in transfers of its value.
    """

    def __init__(
        self, num_blocks: int, rows_per_block: int, num_slots: int, cost: float
    ) -> None:
        self._rows_per_block = rows_per_block
        self._cost = cost
        self._slot_of = np.full((num_blocks, rows_per_block), -1, np.int64)
        self._row_of = np.full(num_slots, -1, np.int64)
        self._uses = np.zeros((num_blocks, rows_per_block), np.float32)

    def __len__(self) -> int:
        return len(self._row_of)

    def slots_of(self, block: int, ids: Longs) -> Longs:
        """Return the slots of a block's rows, -1 for rows that are not at home."""
        slots: Longs = self._slot_of[block, ids]
        return slots

    def held(self, block: int) -> tuple[Longs, Longs]:
        """Return a block's rows that are at home, ascending, and their slots."""
        slots = self._slot_of[block]
        ids = (slots >= 0).nonzero()[0]
        return ids, slots[ids]

    def count(self, block: int, ids: Longs) -> None:
        """Count a transfer of each row, distinct, also of those that are at home."""
        if len(self):
            self._uses[block, ids] += 1

    def release(self, block: int, ids: Longs) -> None:
        """Free the slots of rows that are at home."""
        self._row_of[self._slot_of[block, ids]] = -1
        self._slot_of[block, ids] = -1

    def occupy(self, block: int, ids: Longs, slots: Longs) -> None:
        """Record that rows are at home now, in slots that are free."""
        self._row_of[slots] = block * self._rows_per_block + ids
        self._slot_of[block, ids] = slots

    def fade(self) -> None:
        """Reduce all counts, once per step."""
        self._uses *= np.float32(FADE)

    def exchange(
        self, may_enter: Flags, most: int
    ) -> tuple[list[Moving], list[Moving]]:
        """Choose the rows that leave and those that enter.

        Args:
            may_enter: which blocks have rows that may enter.
            most: the maximum number of rows that enter.

        Returns:
            The rows that leave, and those that enter once their slots are released.
        """
        uses = self._uses.reshape(-1)
        away = (self._slot_of < 0) & may_enter[:, None] & (self._uses > self._cost)
        found = _most(uses, away.reshape(-1).nonzero()[0], most)
        free = (self._row_of < 0).nonzero()[0][: len(found)]
        new, rest = found[: len(free)], found[len(free) :]
        old = _most(-uses, self._row_of[self._row_of >= 0], len(rest))
        rest = rest[: len(old)]
        pays = uses[rest] > uses[old] + 2 * self._cost
        rest, old = rest[pays], old[pays]
        places = self._slot_of.reshape(-1)[old]
        entering = np.concatenate([new, rest]), np.concatenate([free, places])
        return self._by_block(old, places), self._by_block(*entering)

    def _by_block(self, rows: Longs, slots: Longs) -> list[Moving]:
        order = np.argsort(rows)
        rows, slots = rows[order], slots[order]
        block, ids = np.divmod(rows, self._rows_per_block)
        return [
            Moving(int(each), ids[block == each], slots[block == each])
            for each in np.unique(block)
        ]


def _most(uses: NDArray[np.float32], rows: Longs, most: int) -> Longs:
    """Return up to `most` of the rows, those with the most uses first."""
    if len(rows) > most:
        rows = rows[np.argpartition(-uses[rows], most - 1)[:most]] if most else rows[:0]
    found: Longs = rows[np.argsort(-uses[rows], kind="stable")]
    return found
