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

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meft.sparse.pieces import Piece, pieces
from meft.sparse.products import dots, sums
from meft.sparse.router import top
from meft.sparse.row_parameter import begin_backward, mark
from meft.sparse.rows import Tokens
from meft.sparse.store import Ids
from meft.transforms import refuse_create_graph

if TYPE_CHECKING:
    from meft.sparse.adapter import SparseAdapter

PerExpert = Float[Tensor, "tokens experts"]
PerKept = Float[Tensor, "tokens kept"]


def token_topk(
    tokens: Tokens,
    gates: PerExpert | None,
    parameter: nn.Parameter,
    experts: Int[Tensor, "tokens experts"] | None,
    adapter: "SparseAdapter",
) -> Tokens:
    """Return the output of the adapter.

    Args:
        tokens: h, in the dtype of the computation, `tokens hidden`.
        gates: factors on the scores of each token's experts, `tokens experts`; None for
            1.
        parameter: the parameter of the rows.
        experts: the experts of each token, ascending, `tokens experts`; None without
            experts.
        adapter: the adapter with its rows and the number of neurons to keep.

    Returns:
        The output, `tokens hidden`.
    """
    out: Tensor = _TokenTopK.apply(  # type: ignore[no-untyped-call]
        tokens, gates, parameter, experts, adapter
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
        experts: Int[Tensor, "tokens experts"] | None,
        adapter: "SparseAdapter",
    ) -> Tokens:
        """Return the output of the adapter; arguments are those of `token_topk`.

        Args:
            ctx: the autograd context.
            tokens: h, `tokens hidden`.
            gates: factors on the scores, `tokens experts`; None for 1.
            parameter: the parameter of the rows.
            experts: the experts of each token, `tokens experts`; None without experts.
            adapter: the adapter with its rows.

        Returns:
            The output, `tokens hidden`.
        """
        columns, raw = choose(adapter, tokens, gates, experts)
        per_expert = adapter.rows_per_expert
        neurons = neurons_of(columns, experts, per_expert)
        gate = _gate(gates, columns, per_expert)
        weights = torch.relu(raw if gate is None else raw * gate)
        kept = weights > 0
        active = distinct(adapter, neurons[kept])
        adapter.seen.add(len(tokens), len(active))
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for piece in _pieces(adapter, tokens, neurons, kept, active):
            some = weights.flatten()[piece.entries]
            out += sums(some, piece.table, piece.start, piece.values)
        ctx.adapter, ctx.active = adapter, active
        ctx.parameter, ctx.version = parameter, parameter._version
        ctx.save_for_backward(tokens, gates, experts, columns.int(), raw)
        return out.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tokens) -> tuple[Tensor | None, ...]:
        tokens, gates, experts, columns, raw = ctx.saved_tensors
        refuse_create_graph("a sparse adapter")
        adapter: SparseAdapter = ctx.adapter
        wants_rows = begin_backward(ctx, ctx.parameter, ctx.version)
        columns = columns.long()
        neurons = neurons_of(columns, experts, adapter.rows_per_expert)
        gate = _gate(gates, columns, adapter.rows_per_expert)
        weights = torch.relu(raw if gate is None else raw * gate)
        grad = grad.to(tokens.dtype)
        grad_tokens = torch.zeros_like(tokens, dtype=torch.float32)
        grad_score = torch.zeros_like(raw)
        for piece in _pieces(adapter, tokens, neurons, weights > 0, ctx.active):
            score = dots(grad, piece.table, piece.start, piece.values)
            grad_score.view(-1)[piece.entries] = score
            weight = weights.flatten()[piece.entries]
            dot = score if gate is None else score * gate.flatten()[piece.entries]
            grad_tokens += sums(dot, piece.table, piece.start, piece.keys)
            if not wants_rows:
                continue
            order, start, token = piece.by_row()
            keys = sums(dot[order], tokens, start, token)
            values = sums(weight[order], grad, start, token)
            adapter.rows.add_gradient(piece.ids, torch.cat((keys, values), 1))
        grad_gates = None
        if gates is not None:
            place = columns // adapter.rows_per_expert
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


def choose(
    adapter: "SparseAdapter",
    tokens: Tokens,
    gates: PerExpert | None,
    experts: Int[Tensor, "tokens experts"] | None,
) -> tuple[Int[Tensor, "tokens kept"], PerKept]:
    """Return the candidates that each token keeps, and their dot products with it.

    Candidates are numbered 0, 1, ... through the token's experts; without experts they
    are all neurons.

    Args:
        adapter: the adapter with its rows and the number of neurons to keep.
        tokens: h, `tokens hidden`.
        gates: factors on the scores of each token's experts, `tokens experts`; None for
            1.
        experts: the experts of each token, ascending, `tokens experts`; None without
            experts.

    Returns:
        The numbers of the candidates and their dot products, both `tokens kept`.
    """
    k = min(adapter.config.top_k_neurons, adapter.config.num_candidates)
    if experts is None:
        columns = adapter.rows.choose(tokens, k)
        return columns, _scores(adapter, tokens, columns, distinct(adapter, columns))
    per_expert = adapter.rows_per_expert
    inside = torch.arange(per_expert, device=experts.device)
    neurons = (experts[:, :, None] * per_expert + inside).flatten(1)
    candidates = distinct(adapter, experts, per_expert)
    raw = _scores(adapter, tokens, neurons, candidates)
    adapter.seen.total_candidates += len(candidates)
    score = raw if gates is None else raw * gates.repeat_interleave(per_expert, 1)
    columns = top(score, k)
    return columns, raw.gather(1, columns)


def distinct(
    adapter: "SparseAdapter", choice: Int[Tensor, "*shape"], size: int = 1
) -> Ids:
    """Return the distinct neurons in a choice of groups of `size`, ascending.

    Args:
        adapter: the adapter with its rows.
        choice: indices of groups.
        size: neurons per group.
    """
    num_groups = adapter.config.num_neurons // size
    flags = torch.zeros(num_groups, dtype=torch.bool, device=choice.device)
    flags[choice.flatten()] = True
    found = adapter.rows.chosen(flags)
    if size == 1:
        return found
    inside = torch.arange(size, device=found.device)
    return (found[:, None] * size + inside).flatten()


def _scores(
    adapter: "SparseAdapter",
    tokens: Tokens,
    neurons: Int[Tensor, "tokens kept"],
    candidates: Ids,
) -> PerKept:
    raw = torch.empty(neurons.shape, device=tokens.device)
    for piece in _pieces(adapter, tokens, neurons, None, candidates):
        raw.view(-1)[piece.entries] = dots(tokens, piece.table, piece.start, piece.keys)
    return raw


def _pieces(
    adapter: "SparseAdapter",
    tokens: Tokens,
    neurons: Int[Tensor, "tokens kept"],
    counts: Tensor | None,
    active: Ids,
) -> Iterator[Piece]:
    size = adapter.rows_per_piece
    return pieces(adapter.rows, neurons, counts, active, size, tokens.dtype)


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


def _gate(
    gates: PerExpert | None, columns: Int[Tensor, "tokens kept"], per_expert: int
) -> PerKept | None:
    if gates is None:
        return None
    return gates.gather(1, columns // per_expert)
