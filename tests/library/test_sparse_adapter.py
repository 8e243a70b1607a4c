"""What a sparse adapter computes, held against the dense twin."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from library.sparse import HIDDEN, ROUTINGS, config, lone_adapter
from meft.sparse.adapter import Batch, Padding, SparseAdapter
from meft.sparse.dense import DenseAdapter, dense
from meft.sparse.indices import knows_sizes
from meft.sparse.pieces import KEY, VALUE, Choice, pieces, ranks
from meft.sparse.products import dots, starts, sums
from meft.testing import tolerance

TOLERANCE = tolerance(torch.float32, 1)


def tokens(count: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, HIDDEN, generator=generator)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """To rounding, relative to the largest value."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def gradient_of(adapter: SparseAdapter) -> Tensor:
    whole = torch.zeros_like(adapter.rows.store.rows)
    ids, gradient = adapter.rows.gradient()()
    whole[ids] = gradient
    return whole


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("placement", ["offloaded", "resident"])
@pytest.mark.parametrize("device_bytes", [2**30, 9000])
def test_output_and_gradients_are_those_of_the_dense_twin(
    routing: str, placement: str, device_bytes: int
) -> None:
    """With 9000 bytes for rows, they come in pieces of 4."""
    cfg = config(**ROUTINGS[routing], placement=placement, device_bytes=device_bytes)
    adapter = lone_adapter(cfg)
    assert (adapter.block_neurons.rows_per_piece < 5) == (device_bytes == 9000)
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    rows = adapter.rows.store.rows.clone().requires_grad_()
    router = adapter.router
    twin = None if router is None else router.detach().clone().requires_grad_()
    pull = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(8))

    out, wanted = adapter(x), dense(y, rows, twin, cfg)
    out.backward(pull)
    wanted.backward(pull)

    assert_close(out, wanted)
    assert x.grad is not None
    assert y.grad is not None
    assert_close(x.grad, y.grad)
    assert rows.grad is not None
    assert_close(gradient_of(adapter), rows.grad)
    if cfg.router_learns:
        assert router is not None
        assert twin is not None
        assert router.grad is not None
        assert twin.grad is not None
        assert_close(router.grad, twin.grad)
    elif router is not None:
        assert router.grad is None


def test_all_neurons_without_experts_are_the_dense_adapter() -> None:
    cfg = config(num_experts=0, top_k_neurons=64)
    adapter, plain = lone_adapter(cfg), DenseAdapter(HIDDEN, 64)
    with torch.no_grad():
        plain.keys.copy_(adapter.rows.store.rows[:, :HIDDEN])
        plain.values.copy_(adapter.rows.store.rows[:, HIDDEN:])
    x = tokens()
    out, wanted = adapter(x), plain(x)
    out.sum().backward()
    wanted.sum().backward()
    assert_close(out, wanted)
    assert plain.keys.grad is not None
    assert plain.values.grad is not None
    found = gradient_of(adapter)
    assert_close(found[:, :HIDDEN], plain.keys.grad)
    assert_close(found[:, HIDDEN:], plain.values.grad)


@pytest.mark.parametrize("gate", ["none", "softmax"])
def test_one_expert_that_holds_all_is_no_experts(gate: str) -> None:
    """Its gate is 1: there is nothing to weigh it against."""
    one = lone_adapter(config(num_experts=1, top_k_experts=1, gate=gate))
    none = lone_adapter(config(num_experts=0))
    x = tokens()
    assert torch.equal(one(x), none(x))


@pytest.mark.parametrize("routing", ["no experts", "union, no experts"])
def test_of_one_token_both_semantics_are_one(routing: str) -> None:
    x = tokens(1)
    found = lone_adapter(config(**ROUTINGS[routing]))(x)
    assert_close(found, lone_adapter(config(num_experts=0))(x))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_padding_chooses_nothing(routing: str) -> None:
    """Its output is 0, and what it holds changes neither output nor gradient."""
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    found = []
    for filler in (0.0, 100.0):
        adapter = lone_adapter(config(**ROUTINGS[routing]))
        x = tokens(8).view(2, 4, HIDDEN)
        out = adapter(
            torch.where(mask[..., None], x, filler), Batch(padding=Padding.of(mask))
        )
        out.square().sum().backward()
        assert not out[~mask].any()
        found.append((out.detach(), gradient_of(adapter), adapter.counts.total_active))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_nothing_but_padding_adds_nothing() -> None:
    adapter = lone_adapter(config())
    x = tokens(3)[None].requires_grad_()
    out = adapter(x, Batch(padding=Padding.of(torch.zeros(1, 3, dtype=torch.bool))))
    out.sum().backward()
    assert not out.any()
    assert not gradient_of(adapter).any()


@pytest.mark.parametrize("placement", ["offloaded", "resident"])
@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_16_bit_wire_rounds_rows_and_gradients_once(
    wire: str, placement: str
) -> None:
    """Held against the twin on rows that were rounded first."""
    cfg = config(num_experts=0, transfer_dtype=wire, placement=placement)
    adapter = lone_adapter(cfg)
    dtype = getattr(torch, wire)
    rows = adapter.rows.store.rows.to(dtype).float().requires_grad_()
    x = tokens()
    adapter(x).sum().backward()
    dense(x, rows, None, cfg).sum().backward()
    assert rows.grad is not None
    difference = (gradient_of(adapter) - rows.grad).abs().max()
    assert 0 < difference <= torch.finfo(dtype).eps * rows.grad.abs().max()


def test_what_is_saved_is_small() -> None:
    """Tokens, and 8 bytes per kept neuron: nothing of the size of rows or scores."""
    adapter = lone_adapter(config(num_experts=0))
    x = tokens().requires_grad_()
    with meft.testing.saved_bytes() as saved:
        out = adapter(x)
    kept = 11 * 6
    assert saved.total == x.nbytes + kept * (4 + 4)
    del out


def test_products_with_chosen_rows_are_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(9)
    x, table = tokens(5), torch.randn(7, HIDDEN, generator=generator)
    chosen = torch.rand(5, 7, generator=generator) < 0.4
    chosen[2] = False  # a token may have chosen nothing
    token, index = chosen.nonzero(as_tuple=True)
    start = starts(token, 5)
    found = dots(x, table, start, index)
    assert_close(found, (x @ table.T)[chosen])
    weights = torch.randn(len(index), generator=generator)
    whole = torch.zeros(5, 7).masked_scatter(chosen, weights)
    assert_close(sums(weights, table, start, index), whole @ table)


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("size", [3, 4])
def test_products_of_pieces_are_those_of_the_choice(is_known: bool, size: int) -> None:
    """Each number of the choice in one piece, on a CPU and as on a GPU."""
    rows = lone_adapter(config()).rows
    neurons = torch.tensor([[0, 5, 9], [5, 9, 60]])
    counts = torch.tensor([[True, True, False], [True, True, True]])
    active = torch.tensor([0, 5, 9, 60])
    choice = Choice(rank=ranks(64, neurons, counts)[neurons], counts=counts)
    x, numbers = tokens(2), torch.tensor([[2.0, 3, 4], [5, 6, 7]])
    dots, sums = torch.full((2, 3), -1.0), torch.zeros(2, HIDDEN)
    of_rows = torch.zeros(64, HIDDEN)
    with knows_sizes.replaced(lambda device: is_known):
        for piece in pieces(rows.take, choice, active, size):
            piece.dots(x, VALUE, dots)
            sums += piece.sums(numbers, KEY)
            (of_rows[piece.ids],) = piece.row_sums((numbers, x))
    keys, values = rows.store.rows.chunk(2, 1)
    wanted = (values[neurons] @ x[:, :, None])[..., 0].where(counts, -1.0)
    assert_close(dots, wanted)
    weights = numbers * counts
    assert_close(sums, (weights[..., None] * keys[neurons]).sum(1))
    whole = torch.zeros(64, HIDDEN).index_add_(
        0, neurons.flatten(), (weights[..., None] * x[:, None]).flatten(0, 1)
    )
    assert_close(of_rows, whole)


def test_an_adapter_runs_where_autocast_is_on() -> None:
    """It computes as without; its output has the dtype of what it was given."""
    x = tokens()
    plain = lone_adapter(config())
    inside = lone_adapter(config())
    wanted = plain(x)
    wanted.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = inside(x)
        out.sum().backward()
    assert torch.equal(out, wanted)
    assert torch.equal(gradient_of(inside), gradient_of(plain))


def test_the_router_starts_at_its_experts_mean_keys() -> None:
    adapter = lone_adapter(config())
    assert isinstance(adapter.router, nn.Parameter)
    keys: Any = adapter.rows.store.rows[:, :HIDDEN]
    assert_close(adapter.router[3], 50 * keys[6:8].mean(0))
