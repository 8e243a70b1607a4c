"""How often the host waits for the device in a sparse adapter."""

from collections import Counter
from typing import Any

import pytest
import torch

import meft
from library.sparse import (
    DEPTH,
    IN_MODELS,
    ROUTINGS,
    all_rows,
    batches,
    row_gradients,
    sparse_model,
    train,
)
from library.waits import counted
from marks import slow_but_for
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.indices import knows_sizes
from meft.testing import tolerance


def on_a_gpu(device: torch.device) -> bool:
    return False


def waits_of(phase: str, steps: int = 1, **fields: Any) -> Counter[str]:
    """Of all adapters in one phase of a step of a model, after some others."""
    with knows_sizes.replaced(on_a_gpu):
        model = sparse_model(**fields)
        adam = meft.SparseAdamW(model.parameters())
        first, second = batches(2)
        for _ in range(steps):
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


@pytest.mark.parametrize(
    "routing",
    slow_but_for(["experts", "softmax", "ungated", "no experts"], "experts"),
)
@pytest.mark.parametrize("cache", ["steps", "off"])
def test_a_forward_waits_once_per_layer(routing: str, cache: str) -> None:
    fields = ROUTINGS[routing] | {"cache": cache}
    assert waits_of("forward", **fields) == {"download": DEPTH}


@pytest.mark.parametrize("routing", ["experts", "no experts"])
def test_a_backward_waits_for_what_was_sent_in_the_forward_alone(routing: str) -> None:
    """The neurons that answered, per layer, which have arrived long before."""
    assert waits_of("backward", **ROUTINGS[routing]) == {"download": DEPTH}


@pytest.mark.parametrize(
    ("phase", "waits"),
    [("forward", DEPTH), ("backward", 2 * DEPTH - 1), ("update", 1)],
)
def test_rows_at_home_add_no_wait_for_the_running_computation(
    phase: str, waits: int
) -> None:
    """A backward also waits for the gradients of other rows, each when that of the
    next layer has been computed, and the step for those of the last layer. Rows of all
    layers that leave in a step, which none does here, would add one."""
    found = waits_of(phase, 8, cache="home", device_bytes=2**17)
    assert {name for name in found if "index" in name} == set()
    assert found["download"] == waits


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


@pytest.mark.parametrize("routing", slow_but_for([*ROUTINGS], "experts", "no experts"))
@pytest.mark.parametrize("budget", slow_but_for([2**30, 9_000], 9_000))
def test_products_with_every_row_are_those_with_chosen_rows(
    routing: str, budget: int
) -> None:
    """What a GPU does so that the host need not know how many numbers count."""
    fields = ROUTINGS[routing] | {"device_bytes": budget}
    plain = sparse_model(**fields)
    (inputs,) = batches(1)
    plain(**inputs).loss.backward()
    with knows_sizes.replaced(on_a_gpu):
        static = sparse_model(**fields)
        static(**inputs).loss.backward()
    wanted = row_gradients(plain)
    difference = (row_gradients(static) - wanted).abs().max()
    assert difference <= tolerance(torch.float32, DEPTH) * wanted.abs().max()


@pytest.mark.parametrize("routing", slow_but_for([*IN_MODELS], "experts", "no experts"))
@pytest.mark.parametrize("budget", slow_but_for([2**30, 9_000], 9_000))
def test_products_with_every_row_give_the_bits_of_resident_rows(
    routing: str, budget: int
) -> None:
    fields = IN_MODELS[routing] | {"device_bytes": budget}
    with knows_sizes.replaced(on_a_gpu):
        here = sparse_model(**fields, placement="resident")
        away = sparse_model(**fields)
        assert train(here) == train(away)
    assert torch.equal(all_rows(here), all_rows(away))


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
