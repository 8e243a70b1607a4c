"""Rows of chosen neurons, in pieces of a fixed size.

The device then holds one piece of the rows at a time, however many neurons were chosen.
The boundaries of pieces depend on the choice and the size alone, not on where rows are
stored, so sums are added up in the same order everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meft.sparse.products import Index, Start, starts
from meft.sparse.rows import Rows
from meft.sparse.shapes import Ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some rows, and the entries of a choice that refer to them."""

    ids: Ids
    """Indices of the neurons, ascending; on the host."""
    table: Float[Tensor, "keys_and_values hidden"]
    """Key of the first neuron, value of the first, key of the second, ..."""
    entries: Index
    """Positions in the flattened choice, ascending."""
    row: Index
    """Row in this piece, per entry."""
    start: Start
    """First entry of each token."""
    per_token: int
    """Number of entries of a token in the whole choice."""

    @property
    def token(self) -> Index:
        """Return the token of each entry."""
        return self.entries // self.per_token

    @property
    def keys(self) -> Index:
        """Return the position of each entry's key in `table`."""
        return 2 * self.row

    @property
    def values(self) -> Index:
        """Return the position of each entry's value in `table`."""
        return 2 * self.row + 1

    def by_row(self) -> tuple[Index, Start, Index]:
        """Return the entries ordered by row, each row's first entry, and the tokens."""
        order = self.row.argsort(stable=True)
        start = starts(self.row[order], len(self.ids))
        return order, start, self.token[order]


def pieces(
    rows: Rows,
    neurons: Int[Tensor, "tokens kept"],
    counts: Bool[Tensor, "tokens kept"] | None,
    active: Ids,
    size: int,
    dtype: torch.dtype,
) -> Iterator[Piece]:
    """Iterate over a choice, `size` rows at a time.

    Args:
        rows: the rows of the block.
        neurons: the neurons that each token chose, `tokens kept`.
        counts: which of these to include, `tokens kept`; None for all.
        active: all distinct included neurons, ascending; on the host.
        size: maximum number of rows at a time.
        dtype: the dtype of the computation.
    """
    flat = neurons.flatten()
    entries = (
        torch.arange(flat.numel(), device=flat.device)
        if counts is None
        else counts.flatten().nonzero()[:, 0]
    )
    chosen = flat[entries]
    for ids in active.split(size) if len(active) else ():
        table = rows.take(ids).to(dtype).view(2 * len(ids), -1)
        inside, mine = entries, chosen
        if len(ids) < len(active):
            here = (chosen >= ids[0].item()) & (chosen <= ids[-1].item())
            inside, mine = entries[here], chosen[here]
        # Compute the position of each neuron in this piece.
        place = torch.zeros(len(rows.store), dtype=torch.long, device=flat.device)
        place[mine] = 1
        row = (place.cumsum(0) - 1)[mine]
        yield Piece(
            ids=ids,
            table=table,
            entries=inside,
            row=row,
            start=starts(inside // neurons.shape[1], len(neurons)),
            per_token=neurons.shape[1],
        )
