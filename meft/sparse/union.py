"""Output per token over all neurons that any token of the batch kept (the paper).

    out  = relu(h K') V'            K', V': keys and values of the union
    dV'  = relu(h K')^T d           d: the gradient of out
    dS   = (d V'^T) where h K' > 0
    dK'  = h^T dS,   dh = dS K'^T

Hao et al., ACL 2024, equation 4 and algorithm 1. Experts only restrict the neurons that
a token may keep; their gates are not in the sum, so the router does not learn.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from meft.sparse.row_parameter import begin_backward, mark
from meft.sparse.rows import Tokens
from meft.sparse.store import Ids
from meft.sparse.token_topk import choose, distinct, neurons_of
from meft.transforms import refuse_create_graph

if TYPE_CHECKING:
    from meft.sparse.adapter import SparseAdapter


def union(
    tokens: Tokens,
    gates: None,
    parameter: nn.Parameter,
    experts: Int[Tensor, "tokens experts"] | None,
    adapter: "SparseAdapter",
) -> Tokens:
    """Return the output of the adapter.

    Args:
        tokens: h, in the dtype of the computation, `tokens hidden`.
        gates: None, as there are no gates.
        parameter: the parameter of the rows.
        experts: the experts of each token, ascending, `tokens experts`; None without
            experts.
        adapter: the adapter with its rows and the number of neurons to keep.

    Returns:
        The output, `tokens hidden`.
    """
    out: Tensor = _Union.apply(  # type: ignore[no-untyped-call]
        tokens, gates, parameter, experts, adapter
    )
    return out


class _Union(torch.autograd.Function):
    """The autograd function whose formulas are in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tokens,
        gates: None,
        parameter: nn.Parameter,
        experts: Int[Tensor, "tokens experts"] | None,
        adapter: "SparseAdapter",
    ) -> Tokens:
        """Return the output of the adapter; arguments are those of `union`.

        Args:
            ctx: the autograd context.
            tokens: h, `tokens hidden`.
            gates: None, as there are no gates.
            parameter: the parameter of the rows.
            experts: the experts of each token, `tokens experts`; None without experts.
            adapter: the adapter with its rows.

        Returns:
            The output, `tokens hidden`.
        """
        columns, _ = choose(adapter, tokens, None, experts)
        active = distinct(
            adapter, neurons_of(columns, experts, adapter.rows_per_expert)
        )
        adapter.seen.add(len(tokens), len(active))
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for _, keys, values in _pieces(adapter, tokens, active):
            out += torch.relu(tokens @ keys.T) @ values
        ctx.adapter, ctx.active = adapter, active
        ctx.parameter, ctx.version = parameter, parameter._version
        ctx.save_for_backward(tokens)
        return out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tokens) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        refuse_create_graph("a sparse adapter")
        adapter: SparseAdapter = ctx.adapter
        wants_rows = begin_backward(ctx, ctx.parameter, ctx.version)
        grad = grad.to(tokens.dtype)
        grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
        for ids, keys, values in _pieces(adapter, tokens, ctx.active):
            weights = torch.relu(tokens @ keys.T)
            grad_dots = (grad @ values.T) * (weights > 0)
            grad_tokens += grad_dots @ keys
            if wants_rows:
                grad_rows = torch.cat((grad_dots.T @ tokens, weights.T @ grad), 1)
                adapter.rows.add_gradient(ids, grad_rows.float())
        grad_parameter = mark(ctx.parameter) if wants_rows else None
        return grad_tokens.to(tokens.dtype), None, grad_parameter, None, None


def _pieces(
    adapter: "SparseAdapter", tokens: Tokens, active: Ids
) -> Iterator[tuple[Ids, Tensor, Tensor]]:
    for ids in active.split(adapter.rows_per_piece) if len(active) else ():
        keys, values = adapter.rows.take(ids).to(tokens.dtype).chunk(2, 1)
        yield ids, keys, values
