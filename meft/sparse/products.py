"""Products with chosen rows only, at a cost proportional to the choice.

A choice is a sparse matrix of tokens by rows in compressed form: the entries of token t
are `start[t]` to `start[t + 1]`, and `index[n]` is the row of entry n.

    dots(x, table)[n]       = x_t . table_index[n]      for the token t of entry n
    sums(weights, table)[t] = sum over t's entries of weights[n] table_index[n]
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Start = Int[Tensor, " bounds"]
Index = Int[Tensor, " entries"]


def starts(of: Index, count: int) -> Start:
    """Return where the entries of 0, 1, ... `count` - 1 begin, and the end.

    `of` must be ascending; what it has of `count` is after the end.
    """
    return torch.searchsorted(of, torch.arange(count + 1, device=of.device))


def dots(
    x: Float[Tensor, "tokens hidden"],
    table: Float[Tensor, "rows hidden"],
    start: Start,
    index: Index,
) -> Float[Tensor, " entries"]:
    """Return the dot product of each entry's token with its row, in float32.

    Args:
        x: the tokens, `tokens hidden`.
        table: the rows, `rows hidden`.
        start: the first entry of each token, `tokens + 1`.
        index: the row of each entry, `entries`.
    """
    with warnings.catch_warnings():
        # The warning says that compressed tensors are in beta.
        warnings.filterwarnings("ignore", message="Sparse")
        pattern = torch.sparse_csr_tensor(
            start,
            index,
            x.new_zeros(index.numel()),
            (len(x), len(table)),
            check_invariants=False,
        )
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, x, table.T, beta=0.0)
        return sampled.values()


def sums(
    weights: Float[Tensor, " entries"],
    table: Float[Tensor, "rows hidden"],
    start: Start,
    index: Index,
) -> Float[Tensor, "tokens hidden"]:
    """Return the weighted sum of each token's rows, in float32.

    Args:
        weights: the weight of each entry, `entries`.
        table: the rows, `rows hidden`.
        start: the first entry of each token, `tokens + 1`.
        index: the row of each entry, `entries`.
    """
    return functional.embedding_bag(
        index,
        table,
        start,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    ).float()
