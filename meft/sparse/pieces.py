"""Rows of chosen neurons, in pieces of a fixed size.

The device then holds one piece of the rows at a time, however many neurons were chosen.
The boundaries of pieces depend on the choice and the size alone, not on where rows are
stored, so sums are added up in the same order everywhere.

A piece has the entries of a choice that refer to its rows. To find out how many these
are, the host would have to wait for a GPU. There, a piece has all entries, and those of
other rows get the weight 0; sums have the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meft.sparse.indices import keeps_all_entries
from meft.sparse.products import Index, Start, starts
from meft.sparse.rows import Rows
from meft.sparse.shapes import Ids

Flat = Float[Tensor, " all_entries"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The neurons that each token chose."""

    rank: Int[Tensor, "tokens kept"]
    """Position of each among the distinct rows, in ascending order of neurons."""
    counts: Bool[Tensor, "tokens kept"] | None = None
    """Which of these to include; None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some rows, and the entries of a choice that refer to them."""

    ids: Ids
    """Indices of the neurons, ascending; on the host."""
    table: Float[Tensor, "keys_and_values hidden"]
    """Key of the first neuron, value of the first, key of the second, ..."""
    entries: Index
    """Positions in the flattened choice, ascending."""
    is_here: Bool[Tensor, " entries"] | None
    """Which entries refer to rows of this piece; None for all."""
    row: Index
    """Row in this piece, per entry; of entries that are not here, any."""
    start: Start
    """First entry of each token."""
    per_token: int
    """Number of entries of a token in the whole choice."""

    @property
    def keys(self) -> Index:
        """Return the position of each entry's key in `table`."""
        return 2 * self.row

    @property
    def values(self) -> Index:
        """Return the position of each entry's value in `table`."""
        return 2 * self.row + 1

    def of(self, numbers: Flat) -> Float[Tensor, " entries"]:
        """Return the numbers of these entries, 0 for those that are not here.

        Args:
            numbers: a number for each entry of the choice, flattened.
        """
        if self.is_here is None:
            return numbers[self.entries]
        return torch.where(self.is_here, numbers, 0.0)

    def put(self, values: Float[Tensor, " entries"], numbers: Flat) -> None:
        """Write the numbers of these entries into those of the whole choice.

        Args:
            values: a number for each entry of this piece.
            numbers: a number for each entry of the choice, flattened; changed in place.
        """
        if self.is_here is None:
            numbers[self.entries] = values
        else:
            numbers.copy_(torch.where(self.is_here, values, numbers))

    def by_row(self) -> tuple[Index, Start, Index]:
        """Return the entries ordered by row, each row's first entry, and the tokens.

        Entries that are not here are last, after the last row's.
        """
        row = self.row
        if self.is_here is not None:
            row = torch.where(self.is_here, row, len(self.ids))
        order = row.argsort(stable=True)
        start = starts(row[order], len(self.ids))
        return order, start, self.entries[order] // self.per_token


def ranks(
    num_neurons: int,
    chosen: Int[Tensor, "*shape"],
    counts: Bool[Tensor, "*shape"] | None = None,
) -> Int[Tensor, " neurons"]:
    """Return the position of each neuron among the distinct chosen ones.

    Args:
        num_neurons: number of neurons.
        chosen: indices of neurons.
        counts: which of these to include; None for all.
    """
    return flags_of(num_neurons, chosen, counts).cumsum(0) - 1


def flags_of(
    num_neurons: int,
    chosen: Int[Tensor, "*shape"],
    counts: Bool[Tensor, "*shape"] | None = None,
) -> Bool[Tensor, " neurons"]:
    """Return which neurons were chosen; arguments are those of `ranks`."""
    if counts is not None:  # there is one more place, for those that do not count
        chosen = torch.where(counts, chosen, num_neurons)
    flags = torch.zeros(num_neurons + 1, dtype=torch.bool, device=chosen.device)
    return flags.index_fill_(0, chosen.flatten(), True)[:-1]


def pieces(
    take: Callable[[Ids], Float[Tensor, "rows width"]],
    choice: Choice,
    ids: Ids,
    size: int,
) -> Iterator[Piece]:
    """Iterate over a choice, `size` rows at a time.

    Args:
        take: returns rows, in the dtype of the computation.
        choice: the neurons that each token chose.
        ids: all distinct neurons that `choice.rank` counts, ascending; on the host.
        size: maximum number of rows at a time.
    """
    for first in range(0, len(ids), size):
        some = ids[first : first + size]
        yield piece(take(some), choice, some, first, len(ids))


def piece(
    rows: Float[Tensor, "rows width"], choice: Choice, ids: Ids, first: int, count: int
) -> Piece:
    """Return a piece of a choice.

    Args:
        rows: the rows of this piece.
        choice: the neurons that each token chose.
        ids: the neurons of these rows.
        first: rank of the first of them.
        count: the number of rows of all pieces.
    """
    tokens, per_token = choice.rank.shape
    row = choice.rank.flatten()
    is_here = None if choice.counts is None else choice.counts.flatten()
    if len(ids) < count:
        row = row - first
        inside = (row >= 0) & (row < len(ids))
        is_here = inside if is_here is None else is_here & inside
    if is_here is None:
        entries = torch.arange(row.numel(), device=row.device)
        start = torch.arange(0, row.numel() + 1, per_token, device=row.device)
    elif keeps_all_entries(row.device):
        entries = torch.arange(row.numel(), device=row.device)
        start = torch.arange(0, row.numel() + 1, per_token, device=row.device)
        row = row.clamp(0, len(ids) - 1)
    else:
        entries = is_here.nonzero()[:, 0]
        row, is_here = row[entries], None
        start = starts(entries // per_token, tokens)
    return Piece(
        ids=ids,
        table=rows.view(2 * len(ids), -1),
        entries=entries,
        is_here=is_here,
        row=row,
        start=start,
        per_token=per_token,
    )


def take_as(rows: Rows, dtype: torch.dtype) -> Callable[[Ids], Tensor]:
    """Return a function that takes rows in a dtype of the computation."""
    return lambda ids: rows.take(ids).to(dtype)
