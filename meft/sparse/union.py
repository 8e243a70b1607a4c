"""Output per token over all neurons that any token of the batch kept (the paper).

    out  = relu(h K') V'            K', V': keys and values of the union
    dV'  = relu(h K')^T d           d: the gradient of out
    dS   = (d V'^T) where h K' > 0
    dK'  = h^T dS,   dh = dS K'^T

Hao et al., ACL 2024, equation 4 and algorithm 1. Experts only restrict the neurons that
a token may keep; their gates are not in the sum, so the router does not learn.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meft.sparse.block_neurons import BlockNeurons
from meft.sparse.choice import Begun, distinct, finish, neurons_of
from meft.sparse.row_parameter import begin_backward, mark
from meft.sparse.rows import Tokens
from meft.sparse.shapes import Ids
from meft.transforms import refuse_create_graph


def union(begun: Begun, parameter: nn.Parameter, block: BlockNeurons) -> Tokens:
    """Return the output of the block.

    Args:
        begun: the tokens, and what is known of their choice. There are no gates.
        parameter: the parameter of the rows.
        block: the neurons of the block and the number of them to keep.

    Returns:
        The output, `tokens hidden`.
    """
    out: Tensor = _Union.apply(  # type: ignore[no-untyped-call]
        begun.tokens, parameter, begun, block
    )
    return out


class _Union(torch.autograd.Function):
    """The autograd function whose formulas are in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tokens,
        parameter: nn.Parameter,
        begun: Begun,
        block: BlockNeurons,
    ) -> Tokens:
        """Return the output of the adapter.

        Args:
            ctx: the autograd context.
            tokens: h, `tokens hidden`, of `begun`.
            parameter: the parameter of the rows.
            begun: what is known of the choice.
            block: the neurons of the block.

        Returns:
            The output, `tokens hidden`.
        """
        begun = replace(begun, tokens=tokens)  # without their graph
        kept = finish(block, begun)
        per_expert = block.config.neurons_per_expert
        neurons = neurons_of(kept.columns, begun.experts, per_expert)
        active = distinct(block, neurons)
        block.counts.add(len(tokens), kept.num_candidates, active)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for _, keys, values in _pieces(block, tokens, active()):
            out += torch.relu(tokens @ keys.T) @ values
        ctx.block, ctx.active = block, active
        ctx.parameter, ctx.version = parameter, parameter._version
        ctx.save_for_backward(tokens)
        return out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tokens) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        refuse_create_graph("a sparse adapter")
        block: BlockNeurons = ctx.block
        wants_rows = begin_backward(ctx, ctx.parameter, ctx.version)
        grad = grad.to(tokens.dtype)
        grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
        active = ctx.active()
        block.rows.prepare(active)
        for ids, keys, values in _pieces(block, tokens, active):
            weights = torch.relu(tokens @ keys.T)
            grad_dots = (grad @ values.T) * (weights > 0)
            grad_tokens += grad_dots @ keys
            if wants_rows:
                grad_rows = torch.cat((grad_dots.T @ tokens, weights.T @ grad), 1)
                block.rows.add_gradient(ids, grad_rows.float())
        grad_parameter = mark(ctx.parameter) if wants_rows else None
        return grad_tokens.to(tokens.dtype), grad_parameter, None, None


def _pieces(
    block: BlockNeurons, tokens: Tokens, active: Ids
) -> Iterator[tuple[Ids, Tensor, Tensor]]:
    for ids in active.split(block.rows_per_piece) if len(active) else ():
        keys, values = block.rows.take(ids).to(tokens.dtype).chunk(2, 1)
        yield ids, keys, values
