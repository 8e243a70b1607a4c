"""Which neurons each token keeps, and the rows of a choice in pieces.

`choose` scores the candidates of each token and selects the best. `distinct` returns
the neurons that a batch uses, each once.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meft.replaceable import Replaceable
from meft.sparse.block_neurons import BlockNeurons
from meft.sparse.pieces import Piece, pieces
from meft.sparse.products import dots
from meft.sparse.router import top
from meft.sparse.rows import Tokens
from meft.sparse.shapes import Ids

PerExpert = Float[Tensor, "tokens experts"]
PerKept = Float[Tensor, "tokens kept"]


def choose(
    block: BlockNeurons,
    tokens: Tokens,
    gates: PerExpert | None,
    experts: Int[Tensor, "tokens experts"] | None,
) -> tuple[Int[Tensor, "tokens kept"], PerKept]:
    """Return the candidates that each token keeps, and their dot products with it.

    Candidates are numbered 0, 1, ... through the token's experts; without experts they
    are all neurons.

    Args:
        block: the neurons of the block and the number of them to keep.
        tokens: h, `tokens hidden`.
        gates: factors on the scores of each token's experts, `tokens experts`; None for
            1.
        experts: the experts of each token, ascending, `tokens experts`; None without
            experts.

    Returns:
        The numbers of the candidates and their dot products, both `tokens kept`.
    """
    k = min(block.config.top_k_neurons, block.config.num_candidates)
    if experts is None:
        columns = block.rows.choose(tokens, k)
        return columns, _scores(block, tokens, columns, distinct(block, columns))
    per_expert = block.config.neurons_per_expert
    inside = torch.arange(per_expert, device=experts.device)
    neurons = (experts[:, :, None] * per_expert + inside).flatten(1)
    candidates = distinct(block, experts, per_expert)
    raw = _scores(block, tokens, neurons, candidates)
    block.counts.total_candidates += len(candidates)
    score = raw if gates is None else raw * gates.repeat_interleave(per_expert, 1)
    columns = top(score, k)
    return columns, raw.gather(1, columns)


@Replaceable
def distinct(block: BlockNeurons, choice: Int[Tensor, "*shape"], size: int = 1) -> Ids:
    """Return the distinct neurons in a choice of groups of `size`, ascending.

    Args:
        block: the neurons of the block.
        choice: indices of groups.
        size: neurons per group.
    """
    num_groups = block.config.num_neurons // size
    flags = torch.zeros(num_groups, dtype=torch.bool, device=choice.device)
    flags[choice.flatten()] = True
    found = block.rows.chosen(flags)
    if size == 1:
        return found
    inside = torch.arange(size, device=found.device)
    return (found[:, None] * size + inside).flatten()


def _scores(
    block: BlockNeurons,
    tokens: Tokens,
    neurons: Int[Tensor, "tokens kept"],
    candidates: Ids,
) -> PerKept:
    raw = torch.empty(neurons.shape, device=tokens.device)
    for piece in pieces_of(block, tokens, neurons, None, candidates):
        raw.view(-1)[piece.entries] = dots(tokens, piece.table, piece.start, piece.keys)
    return raw


def pieces_of(
    block: BlockNeurons,
    tokens: Tokens,
    neurons: Int[Tensor, "tokens kept"],
    counts: Tensor | None,
    active: Ids,
) -> Iterator[Piece]:
    """Iterate over the rows of a choice, `block.rows_per_piece` at a time.

    Args:
        block: the neurons of the block.
        tokens: h, in the dtype of the computation, `tokens hidden`.
        neurons: the neurons that each token chose, `tokens kept`.
        counts: which of these to include, `tokens kept`; None for all.
        active: all distinct included neurons, ascending; on the host.
    """
    size = block.rows_per_piece
    return pieces(block.rows, neurons, counts, active, size, tokens.dtype)


def neurons_of(
    columns: Int[Tensor, "tokens kept"],
    experts: Int[Tensor, "tokens experts"] | None,
    per_expert: int,
) -> Int[Tensor, "tokens kept"]:
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
