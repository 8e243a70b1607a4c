"""Rows of chosen neurons, in pieces of a fixed size, and products with them.

The device then holds one piece of the rows at a time, however many neurons were chosen.
The boundaries of pieces depend on the choice and the size alone, not on where rows are
stored, so sums are added up in the same order everywhere.

A choice is a matrix of tokens by kept neurons, and a product concerns the numbers of
those of its neurons that are rows of the piece:

    dots(x)[t, n]       = x_t . row(t, n)
    sums(numbers)[t]    = sum over n of numbers[t, n] row(t, n)
    row_sums(numbers, x)[r] = sum over t, n of row r of numbers[t, n] x_t

There are two implementations. `Entries` finds these numbers and costs as much as there
are; a CPU does that. To find them on a GPU, the host would have to wait for it, and
matrix units take less time for products with every row: `Whole` does that, with 0 in
the place of all other numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meft.sparse import products
from meft.sparse.indices import knows_sizes
from meft.sparse.products import Index, Start, starts
from meft.sparse.shapes import Ids

KEY, VALUE = 0, 1
"""Parts of a row."""
PerKept = Float[Tensor, "tokens kept"]
Table = Float[Tensor, "keys_and_values hidden"]
"""Key of the first neuron, value of the first, key of the second, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The neurons that each token chose."""

    rank: Int[Tensor, "tokens kept"]
    """Position of each among the distinct rows, in ascending order of neurons."""
    counts: Bool[Tensor, "tokens kept"] | None = None
    """Which of these to include; None for all."""


@runtime_checkable
class Piece(Protocol):
    """Some rows, and products with the part of a choice that refers to them."""

    @property
    def ids(self) -> Ids:
        """Return the indices of the neurons, ascending; on the host."""

    @property
    def table(self) -> Table:
        """Return the rows, in the dtype of the computation."""

    def dots(
        self, x: Float[Tensor, "tokens hidden"], part: int, numbers: PerKept
    ) -> None:
        """Write the dot product of each token with the rows that it chose.

        Args:
            x: the tokens, `tokens hidden`.
            part: whether with keys (0) or values (1).
            numbers: float32, `tokens kept`; changed where the rows are of this piece.
        """

    def sums(self, numbers: PerKept, part: int) -> Float[Tensor, "tokens hidden"]:
        """Return the weighted sum of each token's rows, in float32.

        Args:
            numbers: the weights, `tokens kept`.
            part: whether of keys (0) or values (1).
        """

    def row_sums(
        self, *pairs: tuple[PerKept, Float[Tensor, "tokens hidden"]]
    ) -> list[Float[Tensor, "rows hidden"]]:
        """Return the weighted sums of each row's tokens, in float32.

        Args:
            *pairs: weights, `tokens kept`, and tokens, `tokens hidden`.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """Products at the cost of the numbers that they concern; see `Piece`."""

    ids: Ids
    table: Table
    entries: Index
    """Positions in the flattened choice, ascending."""
    row: Index
    """Row in this piece, per entry."""
    start: Start
    """First entry of each token."""
    per_token: int
    """Number of entries of a token in the whole choice."""

    def dots(
        self, x: Float[Tensor, "tokens hidden"], part: int, numbers: PerKept
    ) -> None:
        """See `Piece`."""
        index = 2 * self.row + part
        found = products.dots(x, self.table, self.start, index)
        numbers.view(-1)[self.entries] = found

    def sums(self, numbers: PerKept, part: int) -> Float[Tensor, "tokens hidden"]:
        """See `Piece`."""
        weights = numbers.flatten()[self.entries]
        return products.sums(weights, self.table, self.start, 2 * self.row + part)

    def row_sums(
        self, *pairs: tuple[PerKept, Float[Tensor, "tokens hidden"]]
    ) -> list[Float[Tensor, "rows hidden"]]:
        """See `Piece`."""
        order = self.row.argsort(stable=True)
        start = starts(self.row[order], len(self.ids))
        entries = self.entries[order]
        token = entries // self.per_token
        return [
            products.sums(numbers.flatten()[entries], x, start, token)
            for numbers, x in pairs
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """Products with every row of the piece; see `Piece`."""

    ids: Ids
    table: Table
    row: Int[Tensor, "tokens kept"]
    """Row in this piece; of rows that are not here, any."""
    is_here: Bool[Tensor, "tokens kept"] | None
    """Which numbers refer to rows of this piece; None for all."""

    def dots(
        self, x: Float[Tensor, "tokens hidden"], part: int, numbers: PerKept
    ) -> None:
        """See `Piece`."""
        found = (x @ self.table[part::2].T).gather(1, self.row).float()
        numbers.copy_(self._here(found, numbers))

    def sums(self, numbers: PerKept, part: int) -> Float[Tensor, "tokens hidden"]:
        """See `Piece`."""
        return (self._matrix(numbers, self.table.dtype) @ self.table[part::2]).float()

    def row_sums(
        self, *pairs: tuple[PerKept, Float[Tensor, "tokens hidden"]]
    ) -> list[Float[Tensor, "rows hidden"]]:
        """See `Piece`."""
        return [(self._matrix(numbers, x.dtype).T @ x).float() for numbers, x in pairs]

    def _matrix(
        self, numbers: PerKept, dtype: torch.dtype
    ) -> Float[Tensor, "tokens rows"]:
        """Return the numbers in their columns, and 0 elsewhere."""
        matrix = numbers.new_zeros(len(numbers), len(self.ids), dtype=dtype)
        # Of the numbers that are added in one place, at most one is not 0.
        return matrix.scatter_add_(1, self.row, self._here(numbers).to(dtype))

    def _here(self, numbers: PerKept, others: PerKept | float = 0.0) -> PerKept:
        if self.is_here is None:
            return numbers
        return torch.where(self.is_here, numbers, others)


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
    row, is_here = choice.rank, choice.counts
    if len(ids) < count:
        row = row - first
        inside = (row >= 0) & (row < len(ids))
        is_here = inside if is_here is None else is_here & inside
    table = rows.view(2 * len(ids), -1)
    if not knows_sizes(rows.device):
        row = row if is_here is None else row.clamp(0, len(ids) - 1)
        return Whole(ids=ids, table=table, row=row, is_here=is_here)
    tokens, per_token = row.shape
    if is_here is None:
        entries = torch.arange(row.numel(), device=row.device)
        start = torch.arange(0, row.numel() + 1, per_token, device=row.device)
    else:
        entries = is_here.flatten().nonzero()[:, 0]
        start = starts(entries // per_token, tokens)
    return Entries(
        ids=ids,
        table=table,
        entries=entries,
        row=row.flatten()[entries],
        start=start,
        per_token=per_token,
    )


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
