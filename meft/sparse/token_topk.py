"""Output per token as a sum over the neurons that the token keeps (the authors' code).

    s_i  = g_e(i) (k_i . h)              g: the gate of neuron i's expert, 1 without
    out  = sum over kept i of relu(s_i) v_i

    dv_i = sum over tokens of relu(s_i) d        d: the gradient of out
    ds_i = v_i . d  where s_i > 0
    dk_i = sum over tokens of ds_i g h
    dh   = sum over kept i of ds_i g k_i
    dg_e = sum over kept i of e of ds_i (k_i . h)

A neuron with s <= 0 contributes to none of these and is not fetched. Saved for backward
are h and, per token, the neurons that it kept and their k . h.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from meft.sparse.block_neurons import BlockNeurons
from meft.sparse.choice import (
    Begun,
    PerExpert,
    PerKept,
    distinct,
    finish,
    neurons_of,
    pieces_of,
    pieces_of_kept,
)
from meft.sparse.pieces import KEY, VALUE, Choice, ranks
from meft.sparse.row_parameter import begin_backward, mark
from meft.sparse.rows import Tokens
from meft.transforms import refuse_create_graph


def token_topk(begun: Begun, parameter: nn.Parameter, block: BlockNeurons) -> Tokens:
    """Return the output of the block.

    Args:
        begun: the tokens, and what is known of their choice.
        parameter: the parameter of the rows.
        block: the neurons of the block and the number of them to keep.

    Returns:
        The output, `tokens hidden`.
    """
    out: Tensor = _TokenTopK.apply(  # type: ignore[no-untyped-call]
        begun.tokens, begun.gates, parameter, begun, block
    )
    return out


class _TokenTopK(torch.autograd.Function):
    """The autograd function whose formulas are in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tokens,
        gates: PerExpert | None,
        parameter: nn.Parameter,
        begun: Begun,
        block: BlockNeurons,
    ) -> Tokens:
        """Return the output of the adapter.

        Args:
            ctx: the autograd context.
            tokens: h, `tokens hidden`, of `begun`.
            gates: factors on the scores, `tokens experts`, of `begun`; None for 1.
            parameter: the parameter of the rows.
            begun: what is known of the choice.
            block: the neurons of the block.

        Returns:
            The output, `tokens hidden`.
        """
        begun = replace(begun, tokens=tokens, gates=gates)  # without their graphs
        experts, per_expert = begun.experts, block.config.neurons_per_expert
        kept = finish(block, begun)
        columns, raw = kept.columns, kept.raw
        neurons = neurons_of(columns, experts, per_expert)
        gate = _gate(gates, columns, per_expert)
        weights = torch.relu(raw if gate is None else raw * gate)
        counts = weights > 0
        active = distinct(block, neurons, counts)
        block.counts.add(len(tokens), kept.num_candidates, active)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for piece in pieces_of_kept(block, tokens, neurons, counts, kept, active):
            out += piece.sums(weights, VALUE)
        ctx.block, ctx.active = block, active
        ctx.parameter, ctx.version = parameter, parameter._version
        ctx.save_for_backward(tokens, gates, experts, columns.int(), raw)
        return out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tokens) -> tuple[Tensor | None, ...]:
        tokens, gates, experts, columns, raw = ctx.saved_tensors
        refuse_create_graph("a sparse adapter")
        block: BlockNeurons = ctx.block
        wants_rows = begin_backward(ctx, ctx.parameter, ctx.version)
        columns = columns.long()
        neurons = neurons_of(columns, experts, block.config.neurons_per_expert)
        gate = _gate(gates, columns, block.config.neurons_per_expert)
        weights = torch.relu(raw if gate is None else raw * gate)
        grad = grad.to(tokens.dtype)
        grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
        grad_score = torch.zeros_like(raw)
        counts = weights > 0
        rank = ranks(block.config.num_neurons, neurons, counts)[neurons]
        choice = Choice(rank=rank, counts=counts)
        active = ctx.active()
        block.rows.prepare(active)
        for piece in pieces_of(block, tokens, choice, active):
            piece.dots(grad, VALUE, grad_score)
            dot = grad_score if gate is None else grad_score * gate
            grad_tokens += piece.sums(dot, KEY)
            if wants_rows:
                of_rows = piece.row_sums((dot, tokens), (weights, grad))
                block.rows.add_gradient(piece.ids, torch.cat(of_rows, 1))
        grad_gates = None
        if gates is not None:
            place = columns // block.config.neurons_per_expert
            grad_gates = torch.zeros_like(gates).scatter_add_(
                1, place, grad_score * raw
            )
        return (
            grad_tokens.to(tokens.dtype),
            grad_gates,
            mark(ctx.parameter) if wants_rows else None,
            None,
            None,
        )


def _gate(
    gates: PerExpert | None, columns: Int[Tensor, "tokens kept"], per_expert: int
) -> PerKept | None:
    if gates is None:
        return None
    return gates.gather(1, columns // per_expert)
