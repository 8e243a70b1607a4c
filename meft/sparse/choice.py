"""Which neurons each token keeps: scores of the candidates, of which the best are kept.

Candidates are numbered 0, 1, ... through the token's experts; without experts they are
all neurons. `begin` starts to find out which rows a batch needs for its scores, and
`finish` waits for that, once, and computes them. Code between the two runs while the
host and the link are at work.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meft.replaceable import Replaceable
from meft.sparse.block_neurons import BlockNeurons
from meft.sparse.pieces import KEY, Choice, Piece, flags_of, piece, pieces, ranks
from meft.sparse.router import top
from meft.sparse.rows import Tokens
from meft.sparse.shapes import Ids

PerExpert = Float[Tensor, "tokens experts"]
PerKept = Float[Tensor, "tokens kept"]
Columns = Int[Tensor, "tokens kept"]
Experts = Int[Tensor, "tokens experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What is known of a batch before the host has waited for anything."""

    tokens: Tokens
    """h, in the dtype of the computation, `tokens hidden`."""
    gates: PerExpert | None
    """Factors on the scores of each token's experts; None for 1."""
    experts: Experts | None
    """The experts of each token, ascending; None without experts."""
    candidates: Callable[[], tuple[Columns | None, Ids]]
    """Waits, and returns the kept neurons, if they are known by then, and the distinct
    neurons to fetch, ascending, on the device of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyChoice:
    """The experts of a block that were chosen in an earlier one."""

    experts: Experts
    """Those of each token, ascending."""
    candidates: Callable[[], Ids]
    """Waits, and returns their distinct neurons, on the device of the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What tokens keep of their candidates."""

    columns: Columns
    """The numbers of the candidates that each token keeps."""
    raw: PerKept
    """Their dot products with the token."""
    num_candidates: int
    """Number of distinct candidates."""
    table: tuple[Ids, Tensor, Int[Tensor, " neurons"]] | None
    """The candidates, their rows and the rank of each neuron among them, if all were on
    the device at once."""


def begin(
    block: BlockNeurons,
    tokens: Tokens,
    gates: PerExpert | None,
    experts: Experts | None,
    coming: Callable[[], Ids] | None = None,
) -> Begun:
    """Start to find out which rows a batch needs.

    Args:
        block: the neurons of the block and the number of them to keep.
        tokens: h, in the dtype of the computation, `tokens hidden`.
        gates: factors on the scores of each token's experts, `tokens experts`; None for
            1.
        experts: the experts of each token, ascending, `tokens experts`; None without
            experts.
        coming: returns the distinct neurons of these experts, if they have been sent to
            the host already; None to send them.
    """
    if experts is None:
        k = min(block.config.top_k_neurons, block.config.num_candidates)
        choosing = block.rows.choose(tokens, k)

        def candidates() -> tuple[Columns | None, Ids]:
            columns, there = choosing()
            return columns, distinct(block, there, is_there=True)()
    else:
        ids = coming or candidates_of(block, experts)

        def candidates() -> tuple[Columns | None, Ids]:
            return None, ids()

    return Begun(tokens=tokens, gates=gates, experts=experts, candidates=candidates)


def candidates_of(block: BlockNeurons, experts: Experts) -> Callable[[], Ids]:
    """Start to find out the distinct neurons of the experts of all tokens."""
    return distinct(block, experts, size=block.config.neurons_per_expert)


def finish(block: BlockNeurons, begun: Begun) -> Kept:
    """Return the candidates that each token keeps; waits for `begun.candidates`."""
    columns, ids = begun.candidates()
    block.rows.prepare(ids)
    if begun.experts is None:
        assert columns is not None
        raw, table = _scores(block, begun.tokens, columns, ids)
        return Kept(columns=columns, raw=raw, num_candidates=0, table=table)
    per_expert = block.config.neurons_per_expert
    inside = torch.arange(per_expert, device=begun.experts.device)
    neurons = (begun.experts[:, :, None] * per_expert + inside).flatten(1)
    raw, table = _scores(block, begun.tokens, neurons, ids)
    gates = begun.gates
    score = raw if gates is None else raw * gates.repeat_interleave(per_expert, 1)
    k = min(block.config.top_k_neurons, block.config.num_candidates)
    columns = top(score, k)
    raw = raw.gather(1, columns)
    return Kept(columns=columns, raw=raw, num_candidates=len(ids), table=table)


@Replaceable
def distinct(
    block: BlockNeurons,
    choice: Int[Tensor, "*shape"],
    counts: Bool[Tensor, "*shape"] | None = None,
    size: int = 1,
    is_there: bool = False,
) -> Callable[[], Ids]:
    """Start to find out the distinct neurons in a choice of groups of `size`.

    Args:
        block: the neurons of the block.
        choice: indices of groups.
        counts: which of these to include; None for all.
        size: neurons per group.
        is_there: whether `choice` is on the device of the store already.

    Returns:
        A function that waits, once, and returns the neurons, ascending, on the device
        of the store.
    """
    flags = flags_of(block.config.num_neurons // size, choice, counts)
    found = block.rows.chosen(flags, is_there=is_there)
    if size == 1:
        return found

    def neurons() -> Ids:
        groups = found()
        inside = torch.arange(size, device=groups.device)
        return (groups[:, None] * size + inside).flatten()

    return neurons


def _scores(
    block: BlockNeurons, tokens: Tokens, neurons: Columns, ids: Ids
) -> tuple[PerKept, tuple[Ids, Tensor, Int[Tensor, " neurons"]] | None]:
    """Return the dot product of each token with its neurons, and the rows."""
    rank = ranks(block.config.num_neurons, neurons)
    choice = Choice(rank=rank[neurons])
    raw = torch.empty(neurons.shape, device=tokens.device)
    held = None
    for part in pieces_of(block, tokens, choice, ids):
        part.dots(tokens, KEY, raw)
        if len(part.ids) == len(ids):
            held = (ids, part.table, rank)
    return raw, held


def pieces_of_kept(
    block: BlockNeurons,
    tokens: Tokens,
    neurons: Columns,
    counts: Bool[Tensor, "tokens kept"],
    kept: Kept,
    active: Callable[[], Ids],
) -> Iterator[Piece]:
    """Iterate over the rows of the neurons that tokens keep.

    These are rows that are on the device since their scores were computed. If there
    was no room for all candidates, the host waits for `active`, and takes these again.

    Args:
        block: the neurons of the block.
        tokens: h, in the dtype of the computation, `tokens hidden`.
        neurons: the neurons that each token keeps, `tokens kept`.
        counts: which of these to include, `tokens kept`.
        kept: what `finish` returned.
        active: returns all distinct included neurons.
    """
    if kept.table is None:
        rank = ranks(block.config.num_neurons, neurons, counts)[neurons]
        choice = Choice(rank=rank, counts=counts)
        yield from pieces_of(block, tokens, choice, active())
        return
    ids, table, rank = kept.table
    choice = Choice(rank=rank[neurons], counts=counts)
    yield piece(table.view(len(ids), -1), choice, ids, 0, len(ids))


def pieces_of(
    block: BlockNeurons, tokens: Tokens, choice: Choice, ids: Ids
) -> Iterator[Piece]:
    """Iterate over the rows of a choice, `block.rows_per_piece` at a time.

    Args:
        block: the neurons of the block.
        tokens: h, in the dtype of the computation, `tokens hidden`.
        choice: the neurons that each token chose.
        ids: the distinct neurons of the choice, ascending; on the host.
    """

    def take(some: Ids) -> Tensor:
        return block.rows.take(some).to(tokens.dtype)

    return pieces(take, choice, ids, block.rows_per_piece)


def neurons_of(columns: Columns, experts: Experts | None, per_expert: int) -> Columns:
    """Return the neurons that candidates represent.

    Args:
        columns: the numbers of the candidates, `tokens kept`.
        experts: the experts of each token, `tokens experts`; None without experts.
        per_expert: neurons in an expert.
    """
    if experts is None:
        return columns
    first = experts.gather(1, columns // per_expert) * per_expert
    return first + columns % per_expert
