"""How often the host waits for the device in a sparse adapter."""

from collections import Counter
from typing import Any

import pytest
import torch

import meft
from library.sparse import (
    DEPTH,
    ROUTINGS,
    all_rows,
    batches,
    row_gradients,
    sparse_model,
    train,
)
from library.waits import counted
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.indices import keeps_all_entries
from meft.sparse.pieces import Piece
from meft.sparse.products import dots_of_all


def on_a_gpu(device: torch.device) -> bool:
    return True


def waits_of(phase: str, **fields: Any) -> Counter[str]:
    """Of all adapters in one phase of the second step of a model."""
    with keeps_all_entries.replaced(on_a_gpu):
        model = sparse_model(**fields)
        adam = meft.SparseAdamW(model.parameters())
        first, second = batches(2)
        model(**first).loss.backward()
        adam.step()
        adam.zero_grad()
        inputs = {"input_ids": second["input_ids"]}  # without padding
        logits = None
        with counted() as found:
            logits = model(**inputs).logits
        if phase == "forward":
            return found
        with counted() as found:
            logits.sum().backward()
        if phase == "backward":
            return found
        with counted() as found:
            adam.step()
        return found


@pytest.mark.parametrize("routing", ["experts", "softmax", "ungated", "no experts"])
@pytest.mark.parametrize("cache", ["steps", "off"])
def test_a_forward_waits_once_per_layer(routing: str, cache: str) -> None:
    fields = ROUTINGS[routing] | {"cache": cache}
    assert waits_of("forward", **fields) == {"download": DEPTH}


@pytest.mark.parametrize("routing", ["experts", "no experts"])
def test_a_backward_waits_for_what_was_sent_in_the_forward_alone(routing: str) -> None:
    """The neurons that answered, per layer, which have arrived long before."""
    assert waits_of("backward", **ROUTINGS[routing]) == {"download": DEPTH}


def test_every_neuron_needs_no_choice() -> None:
    fields = {"num_experts": 0, "top_k_neurons": 64}
    assert waits_of("forward", **fields) == {}


def test_a_step_waits_once_per_layer() -> None:
    """For the gradients, of which those of the next layer are on their way."""
    assert waits_of("update")["download"] == DEPTH


def test_where_an_eighth_does_not_hold_the_candidates_it_waits_twice() -> None:
    found = waits_of("forward", device_bytes=9_000)
    assert found["download"] == 2 * DEPTH


def test_the_choice_is_sent_before_the_feed_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the host waits while the device computes."""
    model = sparse_model()
    order: list[str] = []
    block = model.model.layers[0]
    block.mlp.register_forward_hook(lambda *a: order.append("feed-forward"))
    begin, forward = SparseAdapter.begin, SparseAdapter.forward

    def noted_begin(self: SparseAdapter, *args: Any, **kwargs: Any) -> Any:
        order.append("begin")
        return begin(self, *args, **kwargs)

    def noted_forward(self: SparseAdapter, *args: Any, **kwargs: Any) -> Any:
        order.append("finish")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SparseAdapter, "begin", noted_begin)
    monkeypatch.setattr(SparseAdapter, "forward", noted_forward)
    (inputs,) = batches(1)
    model(**inputs)  # the first is also compared with the block's own forward
    del order[:]
    model(**inputs)
    assert order[:3] == ["begin", "feed-forward", "finish"]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("budget", [2**30, 9_000])
def test_entries_of_weight_0_change_no_bit(
    routing: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does so that the host need not know how many entries count."""
    for module in ("choice", "token_topk"):  # a GPU's products, for both
        monkeypatch.setattr(f"meft.sparse.{module}.dots", dots_of_all)
    fields = ROUTINGS[routing] | {"device_bytes": budget}
    plain = sparse_model(**fields)
    with keeps_all_entries.replaced(on_a_gpu):
        static = sparse_model(**fields)
        (inputs,) = batches(1)
        static(**inputs).loss.backward()
        found = row_gradients(static)
        static.zero_grad()
        losses = train(static)
    plain(**inputs).loss.backward()
    assert torch.equal(found, row_gradients(plain))
    plain.zero_grad()
    assert losses == train(plain)
    assert torch.equal(all_rows(static), all_rows(plain))


def test_a_count_is_not_lost_before_it_is_read() -> None:
    """Activity is counted when it arrives, with gradients and without."""
    model = sparse_model()
    (inputs,) = batches(1)
    with torch.no_grad():
        model(**inputs)
    counts = next(iter(sparse_adapters(model).values())).counts
    first = counts.total_active
    assert first > 0
    model(**inputs).loss.backward()
    assert counts.total_active == 2 * first
    assert counts.num_batches == 2
    counts.clear()
    assert (counts.total_active, counts.num_batches) == (0, 0)


def test_a_piece_leaves_out_what_is_elsewhere() -> None:
    piece = Piece(
        ids=torch.tensor([3, 4]),
        table=torch.zeros(4, 2),
        entries=torch.arange(4),
        is_here=torch.tensor([True, False, True, False]),
        row=torch.tensor([1, 0, 0, 1]),
        start=torch.tensor([0, 2, 4]),
        per_token=2,
    )
    assert piece.of(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 0, 3, 0]
    numbers = torch.tensor([9.0, 9, 9, 9])
    piece.put(torch.tensor([1.0, 2, 3, 4]), numbers)
    assert numbers.tolist() == [1, 9, 3, 9]
    order, start, token = piece.by_row()
    assert order[:2].tolist() == [2, 0]
    assert start.tolist() == [0, 1, 2]
    assert token[:2].tolist() == [1, 0]
