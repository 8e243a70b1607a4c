"""Rows of chosen neurons, a piece of a fixed size at a time.

What a device holds of the rows is then one piece, however many neurons were chosen.
Where a piece ends depends on the choice and the size alone, never on where rows live:
sums are added up in the same order everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meft.sparse.products import Index, Start, starts
from meft.sparse.rows import Rows
from meft.sparse.store import Ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some rows, and the entries of a choice that fall on them."""

    ids: Ids
    """Which neurons, ascending; on the host."""
    table: Float[Tensor, "keys_and_values hidden"]
    """Key of the first, value of the first, key of the second, ..."""
    entries: Index
    """Of the flattened choice, ascending."""
    row: Index
    """In this piece, per entry."""
    start: Start
    """Of each token among the entries."""
    per_token: int
    """Entries a token has in the whole choice."""

    @property
    def token(self) -> Index:
        """Per entry."""
        return self.entries // self.per_token

    @property
    def keys(self) -> Index:
        """Where an entry's key is in `table`."""
        return 2 * self.row

    @property
    def values(self) -> Index:
        """Where an entry's value is in `table`."""
        return 2 * self.row + 1

    def by_row(self) -> tuple[Index, Start, Index]:
        """Entries ordered by row, where each row's begin, and their tokens."""
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
    """Go through a choice, `size` rows at a time.

    Args:
        rows: where to get them.
        neurons: what each token chose.
        counts: which of these to leave in; None for all.
        active: all distinct neurons left in, ascending; on the host.
        size: most rows at a time.
        dtype: to compute in.
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
        # Where each neuron is in this piece.
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
