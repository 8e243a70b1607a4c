"""Rows in host memory: the same bits as on the device, and every byte booked."""

import functools
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import meft
from library.sparse import (
    DEPTH,
    HIDDEN,
    IN_MODELS,
    all_rows,
    batches,
    config,
    engine_of,
    lone_adapter,
    row_gradients,
    sparse_model,
    train,
)
from meft.sparse.adapter import sparse_adapters
from meft.sparse.cache import GradientSlots, RowCache
from meft.sparse.engine import Engine, slots_for
from meft.sparse.offloaded_rows import OffloadedRows, offload
from meft.sparse.schedule import Schedule
from meft.sparse.store import RowStore
from meft.transfer import PendingCopy, TransferTag

ENGINES: dict[str, dict[str, Any]] = {
    "all on": {},
    "no prefetch": {"prefetch": False},
    "window": {"cache": "window"},
    "no cache": {"cache": "off"},
    "small cache": {"device_bytes": 60_000},
    "tiny cache": {"device_bytes": 9_000},
    "home": {"cache": "home"},
    "small home": {"cache": "home", "device_bytes": 60_000},
}
"""The features of the engine, each switched off, and budgets that do not suffice."""


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_50_steps_give_the_bits_of_resident_rows(
    engine: str, window: int, wire: str
) -> None:
    fields = {"transfer_dtype": wire, **ENGINES[engine]}
    away = sparse_model(**fields)
    losses, rows = resident(wire, ENGINES[engine].get("device_bytes"), window)
    assert train(away, 50, window) == losses
    assert torch.equal(all_rows(away), rows)


@functools.cache
def resident(
    wire: str, device_bytes: int | None, window: int
) -> tuple[list[float], torch.Tensor]:
    """Return the losses and rows of 50 steps of the twin of several engines."""
    fields: dict[str, Any] = {}
    if device_bytes is not None:
        fields["device_bytes"] = device_bytes
    model = sparse_model(**fields, transfer_dtype=wire, placement="resident")
    return train(model, 50, window), all_rows(model).clone()


FAST = {(routing, "tiny cache") for routing in IN_MODELS} | {
    ("experts", "all on"),
    ("union", "all on"),
}


@pytest.mark.parametrize(
    ("routing", "engine"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in itertools.product(IN_MODELS, ENGINES)
        if "home" not in pair[1] or "no experts" not in pair[0]
    ],
)
def test_offloaded_rows_give_the_bits_of_resident_rows(
    routing: str, engine: str
) -> None:
    """Losses (and so outputs and choices), gradients, and rows after four steps."""
    fields = IN_MODELS[routing] | ENGINES[engine]
    here = sparse_model(**fields, placement="resident")
    away = sparse_model(**fields, placement="offloaded")
    for model in (here, away):
        model(**next(batches(1))).loss.backward()
    assert torch.equal(row_gradients(here), row_gradients(away))
    for name, parameter in here.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, away.get_parameter(name).grad)  # type: ignore[arg-type]
    for model in (here, away):
        model.zero_grad()
    assert train(here) == train(away)
    assert torch.equal(all_rows(here), all_rows(away))


@pytest.mark.parametrize("semantics", ["token_topk", "union"])
def test_a_budget_whose_eighth_holds_what_a_batch_chose_changes_no_bit(
    semantics: str,
) -> None:
    """A smaller one computes with a piece of the chosen rows at a time: sums over
    neurons are split, which changes how they round, and nothing else."""
    losses, rows = {}, {}
    row_bytes = 2 * 4 * 2 * HIDDEN  # a key and a value in float32, and their gradients
    enough = 8 * row_bytes * config().num_neurons
    for budget in (2**30, enough, 9_000):
        model = sparse_model(semantics=semantics, device_bytes=budget)
        losses[budget], rows[budget] = train(model), all_rows(model)
    assert losses[enough] == losses[2**30]
    assert torch.equal(rows[enough], rows[2**30])
    assert not torch.equal(rows[9_000], rows[2**30])
    assert (rows[9_000] - rows[2**30]).abs().max() < 1e-4


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_16_bit_wire_gives_the_bits_of_resident_16_bit_rows(
    engine: str, window: int, wire: str
) -> None:
    """However often a gradient travels: what a batch adds is rounded everywhere."""
    fields = {"transfer_dtype": wire, **ENGINES[engine]}
    here = sparse_model(**fields, placement="resident")
    away = sparse_model(**fields)
    found = train(here, window=window), train(away, window=window)
    assert found[0] == found[1]
    assert torch.equal(all_rows(here), all_rows(away))


@pytest.mark.parametrize("cache", ["steps", "off"])
def test_a_gradient_that_was_replaced_has_the_same_bits_everywhere(cache: str) -> None:
    """It is float32, as the user's own, and rounded when the optimizer takes it."""
    found = []
    for placement in ("resident", "offloaded"):
        model = sparse_model(
            transfer_dtype="bfloat16", cache=cache, placement=placement
        )
        adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
        first, second = batches(2)
        model(**first).loss.backward()
        for adapter in sparse_adapters(model).values():
            assert adapter.neurons.grad is not None
            adapter.neurons.grad = adapter.neurons.grad * 0.3
        model(**second).loss.backward()
        adam.step()
        found.append(all_rows(model))
    assert torch.equal(*found)


def test_the_ledger_is_the_closed_formula() -> None:
    """Without a cache, per block: what a batch activates goes up and its gradient down.

    With experts, rows of chosen experts go up to be scored, and stay until their sums;
    those that answer go up again in backward; a byte per expert and per neuron.
    """
    model = sparse_model(cache="off")
    engine = engine_of(model)
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    row = 2 * HIDDEN * 4
    for index, adapter in enumerate(sparse_adapters(model).values()):
        name, seen = f"block {index}", adapter.counts
        assert 0 < seen.total_active < seen.total_candidates
        up, down = engine.ledger.h2d, engine.ledger.d2h
        forward = row * seen.total_candidates
        assert up[TransferTag(name, "forward")] == forward
        assert down[TransferTag(name, "forward")] == 32 + 64
        assert up[TransferTag(name, "backward")] == row * seen.total_active
        assert down[TransferTag(name, "backward")] == row * seen.total_active
        assert up[TransferTag(name, "update")] == down[TransferTag(name, "update")] == 0


def test_in_a_window_every_row_and_gradient_travels_once() -> None:
    """Four batches, then a step: at most all rows up, at most all gradients down."""
    model = sparse_model(prefetch=False)
    engine = engine_of(model)
    optimizer = meft.SparseAdamW(model.parameters())
    touched = [set[int]() for _ in range(DEPTH)]
    for inputs in batches(4):
        model(**inputs).loss.backward()
    for index, adapter in enumerate(sparse_adapters(model).values()):
        touched[index] = set(adapter.rows.gradient()()[0].tolist())
    engine.ledger.d2h.clear()
    optimizer.step()
    row = 2 * HIDDEN * 4
    for index in range(DEPTH):
        name = f"block {index}"
        down = engine.ledger.d2h[TransferTag(name, "update")]
        assert down == row * len(touched[index])
    rows_up = sum(engine.num_taken - engine.num_hits for _ in range(1))
    assert rows_up <= DEPTH * 64


def test_prefetched_rows_are_found_in_the_cache() -> None:
    """After a step, what a block used last is there before it asks."""
    hits = {}
    for prefetch in (False, True):
        model = sparse_model(prefetch=prefetch)
        train(model)
        engine = engine_of(model)
        hits[prefetch] = engine.num_hits / engine.num_taken
        assert (engine.num_prefetched > 0) == prefetch
    assert hits[True] > hits[False]


def device_bytes(engine: Engine) -> int:
    """What the engine holds on the device between steps."""
    return sum(slab.nbytes for slab in engine.slabs)


def test_device_bytes_do_not_grow_with_the_number_of_neurons() -> None:
    """16 times the neurons in the same budget: the same slots, and the same pieces."""
    found = []
    for neurons in (1024, 16384):
        cfg = config(num_neurons=neurons, num_experts=128, device_bytes=100_000)
        adapter = lone_adapter(cfg)
        x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
        largest = 0

        def note(tensor: torch.Tensor, take: Any = adapter.rows.take) -> torch.Tensor:
            nonlocal largest
            rows: torch.Tensor = take(tensor)
            largest = max(largest, rows.nbytes)
            return rows

        adapter.rows.take = note  # type: ignore[method-assign, assignment]
        adapter(x).sum().backward()
        assert isinstance(adapter.rows, OffloadedRows)
        held = device_bytes(adapter.rows.engine)
        assert held + 2 * largest <= cfg.device_bytes
        found.append((held, largest))
    assert found[0] == found[1]


def test_rows_that_changed_are_fetched_again_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(1)
    store = RowStore(torch.randn(64, 8, generator=generator), torch.float32)
    engine = offload([store], config())
    rows = engine.blocks[0]
    ids = torch.arange(6)
    rows.begin_batch(torch.device("cpu"))
    rows.take(ids)
    with torch.no_grad():
        store.rows[2] += 1
    store.updated_at[2] = 1
    before = engine.ledger.h2d_bytes
    assert torch.equal(rows.take(ids), store.rows[:6])
    # One row of 8 floats, and where it goes, and where the others were.
    assert 8 * 4 < engine.ledger.h2d_bytes - before <= 8 * 4 + 4 * 20
    assert engine.num_hits == 5


def dense(wire: torch.dtype, **fields: Any) -> tuple[RowStore, OffloadedRows]:
    """Rows of one block that has taken a step, without a model."""
    generator = torch.Generator().manual_seed(1)
    store = RowStore(torch.randn(64, 8, generator=generator), wire)
    rows = offload([store], config(**fields)).blocks[0]
    assert isinstance(rows, OffloadedRows)
    rows.begin_batch(torch.device("cpu"))
    store.schedule = Schedule()
    store.schedule.add(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    store.step(torch.arange(0, 64, 2), torch.ones(32, 8))
    return store, rows


@pytest.mark.parametrize(
    ("missing", "first", "last"), [([], 0, 64), ([], 9, 41), ([9, 20, 33, 35], 5, 37)]
)
def test_where_almost_all_rows_are_wanted_they_are_uploaded_from_the_store(
    missing: list[int], first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie there: what is between them travels too, and is left out there."""
    store, rows = dense(torch.bfloat16, cache="off")
    monkeypatch.setattr(rows.engine.link, "staging", None)
    ids = torch.tensor([i for i in range(first, last) if i not in missing])
    taken = rows.take(ids)
    assert torch.equal(taken, store.settled()[ids].bfloat16())
    assert store.shadow is not None
    assert taken.data_ptr() != store.shadow[first:].data_ptr()
    places = 4 * len(ids) if missing else 0
    assert rows.engine.ledger.h2d_bytes == 2 * 8 * (last - first) + places


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32])
def test_otherwise_they_are_gathered(wire: torch.dtype) -> None:
    """Also those in float32, whose values are not stored."""
    store, rows = dense(wire, cache="off")
    every = torch.arange(0 if wire == torch.float32 else 30, 64)
    ids = every[every % 5 != 0] if wire == torch.bfloat16 else every
    assert torch.equal(rows.take(ids), store.settled()[ids].to(wire))
    assert rows.engine.ledger.h2d_bytes == wire.itemsize * 8 * len(ids)


@pytest.mark.parametrize("change", ["step", "write"])
def test_rows_do_not_change_while_they_are_uploaded(change: str) -> None:
    """The store waits for the upload first."""
    store, rows = dense(torch.bfloat16, cache="off")
    rows.take(torch.arange(64))
    assert store.shadow is not None
    before, seen = store.shadow.clone(), []
    store.wait_for_upload = lambda: seen.append(store.shadow.clone())  # type: ignore[union-attr]
    if change == "step":
        assert store.schedule is not None
        store.schedule.add(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        store.step(torch.arange(3), torch.ones(3, 8))
    else:
        store.assign(store.settled() + 1)
    assert torch.equal(seen[0], before)
    assert not torch.equal(store.shadow, before)


def test_waiting_for_an_upload_does_not_keep_its_copy() -> None:
    """Which takes memory of the device."""

    class Event:
        waits = 0

        def synchronize(self) -> None:
            self.waits += 1

    event, rows = Event(), torch.ones(3)
    copied = weakref.ref(rows)
    wait = PendingCopy(rows, event).wait
    del rows
    wait()
    assert event.waits == 1
    assert copied() is None
    PendingCopy(torch.ones(3), None).wait()  # it was synchronous


@pytest.mark.parametrize("engine", ENGINES)
def test_where_every_neuron_answers_the_bits_are_those_of_resident_rows(
    engine: str,
) -> None:
    fields = ENGINES[engine] | {"num_experts": 0, "top_k_neurons": 64}
    here = sparse_model(**fields, transfer_dtype="bfloat16", placement="resident")
    away = sparse_model(**fields, transfer_dtype="bfloat16")
    assert train(here) == train(away)
    assert torch.equal(all_rows(here), all_rows(away))


def test_a_full_cache_keeps_what_it_has() -> None:
    """What a block will need again soonest is not thrown out for what comes by."""
    cache = RowCache(num_blocks=2, rows_per_block=4, num_slots=3)
    ids = np.arange(3)
    cache.begin_round(0)
    assert cache.admit(0, ids).tolist() == [0, 1, 2]
    cache.begin_round(1)
    assert cache.admit(1, ids).tolist() == [-1, -1, -1]
    # Block 0 goes on without row 2, which is given up after two rounds.
    for _ in range(2):
        cache.begin_round(0)
        assert cache.find(0, ids[:2]).tolist() == [0, 1]
    assert cache.admit(1, ids).tolist() == [2, -1, -1]
    assert cache.find(0, ids).tolist() == [0, 1, -1]
    assert cache.find(1, ids).tolist() == [2, -1, -1]


def test_a_gradient_keeps_its_slot_until_it_is_cleared() -> None:
    slots = GradientSlots(num_blocks=2, rows_per_block=4, num_slots=3)
    every = np.ones(2, bool)
    assert slots.assign(0, np.array([1, 3]), every).tolist() == [0, 1]
    assert slots.assign(1, np.array([0, 2]), every).tolist() == [2, -1]
    assert slots.assign(0, np.array([1, 2]), every).tolist() == [0, -1]
    assert [part.tolist() for part in slots.held(0)] == [[1, 3], [0, 1]]
    slots.release(0)
    assert [len(part) for part in slots.held(0)] == [0, 0]
    # One whose sum was begun on the host gets none, although there is room now.
    assert slots.assign(1, np.array([2, 3]), np.array([False, True])).tolist() == [
        -1,
        0,
    ]
    assert [part.tolist() for part in slots.held(1)] == [[0, 3], [2, 0]]


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32])
def test_rows_have_slots_before_their_gradients(wire: torch.dtype) -> None:
    """Within the budget: three times as many as with room for a gradient each."""
    width, rows = 32, 1000
    for budget in (0, 10_000, 40_000, 100_000, 10**7):
        held, gradients, home = slots_for(
            config(device_bytes=max(budget, 1)), rows, width, wire
        )
        assert home == 0
        used = width * (held * wire.itemsize + gradients * 4)
        assert used <= budget * 7 // 8
        assert held == rows or (held + 1) * width * wire.itemsize > budget * 7 // 8
        assert gradients == 0 or held == rows
        assert budget < 10**7 or held == gradients == rows


def test_moving_the_model_leaves_the_rows_where_they_are() -> None:
    """In the same memory and in float32; the router follows."""
    model = sparse_model()
    rows = [a.rows.store.rows for a in sparse_adapters(model).values()]
    torch.nn.Module.to(model, torch.float64)
    for adapter, before in zip(sparse_adapters(model).values(), rows, strict=True):
        assert adapter.router is not None
        assert adapter.router.dtype == torch.float64
        assert adapter.rows.store.rows is before
        assert adapter.neurons.dtype == torch.float32
        assert adapter.neurons.data_ptr() == before.data_ptr()
