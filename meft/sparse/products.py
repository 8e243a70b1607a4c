"""Products with chosen rows only, at the cost of what was chosen.

A choice is a sparse matrix of tokens by rows in compressed form: `start[t]` to
`start[t + 1]` are the entries of token t, and `index[n]` is the row of entry n.

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
    """Where the entries of 0, 1, ... `count` - 1 begin, and the end; `of` ascends."""
    counts = torch.bincount(of, minlength=count)
    return functional.pad(counts.cumsum(0), (1, 0))


def dots(
    x: Float[Tensor, "tokens hidden"],
    table: Float[Tensor, "rows hidden"],
    start: Start,
    index: Index,
) -> Float[Tensor, " entries"]:
    """The dot product of each entry's token with its row, in float32."""
    if x.is_cuda:
        # A product with every row, on the units made for it, costs less than fetching
        # pairs does.
        token = torch.repeat_interleave(start.diff(), output_size=index.numel())
        return (x @ table.T)[token, index].float()
    with warnings.catch_warnings():
        # That compressed tensors are in beta; these are right by construction.
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
    """The weighted sum of each token's rows, in float32."""
    return functional.embedding_bag(
        index,
        table,
        start,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    ).float()
