"""Rows at home on the device: the same bits, and few transfers."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import meft
from library.sparse import (
    DEPTH,
    HIDDEN,
    all_rows,
    batches,
    config,
    engine_of,
    sparse_model,
)
from marks import slow_but_for
from meft.errors import ConfigError
from meft.sparse.adapter import sparse_adapters
from meft.sparse.admission import FADE, HomeSlots
from meft.sparse.engine import Engine
from meft.sparse.home import STATES
from meft.sparse.offloaded_rows import offload
from meft.sparse.schedule import Schedule
from meft.sparse.store import RowStore

NEURONS = 64 * DEPTH
ROW = 2 * HIDDEN
BUDGETS = {"no rows": 0, "a few rows": 16, "half of the rows": 96, "all rows": NEURONS}
"""How many rows may be at home."""


def budget(rows: int, wire: str) -> int:
    """Device bytes for that many, next to the values of all."""
    itemsize: int = getattr(torch, wire).itemsize
    numbers = NEURONS * itemsize + rows * 4 * (STATES + 1)
    return math.ceil(ROW * numbers * 8 / 7)


class Stop(Exception):
    """Raised inside of a block."""


def at_home(model: PreTrainedModel) -> int:
    """How many rows are at home now."""
    slots = engine_of(model).home.slots
    return sum(len(slots.held(block)[0]) for block in range(DEPTH))


def state(model: PreTrainedModel) -> list[Tensor]:
    """Of all rows: their values, and m and v of their last gradient."""
    rows = all_rows(model)
    found = [rows, *(p for p in model.parameters() if p.requires_grad)]
    for adapter in sparse_adapters(model).values():
        store = adapter.rows.store
        found += [*store.moments, store.factors, store.updated_at]
    return found


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, wanted in zip(one, other, strict=True):
        assert torch.equal(mine, wanted)


def train(
    model: PreTrainedModel, steps: int, window: int, each: Callable[[], object]
) -> list[float]:
    adam = meft.SparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    data = batches(steps * window)
    losses = []
    for _ in range(steps):
        for _ in range(window):
            loss = model(**next(data)).loss
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        losses.append(norm.item())
        adam.step()
        adam.zero_grad()
        each()
    return losses


@pytest.mark.parametrize(
    ("room", "window", "wire", "update"),
    slow_but_for(
        [
            (room, window, wire, update)
            for room in BUDGETS
            for window in (1, 8)
            for wire in ("float32", "bfloat16", "float16")
            for update in ("catchup", "lazy", "dense")
        ],
        ("a few rows", 1, "bfloat16", "catchup"),
        ("half of the rows", 1, "bfloat16", "dense"),
        ("all rows", 1, "float16", "lazy"),
    ),
)
def test_50_steps_give_the_bits_of_resident_rows(
    room: str, window: int, wire: str, update: str
) -> None:
    """Losses, norms of gradients, rows, both moments and the effect of idle steps.

    Of eight batches each, 12 steps.
    """
    fields: dict[str, Any] = {"transfer_dtype": wire, "update": update}
    fields["device_bytes"] = budget(BUDGETS[room], wire)
    steps = 50 if window == 1 else 12
    here = sparse_model(**fields, placement="resident")
    away = sparse_model(**fields, cache="home")
    held: list[int] = []
    wanted = train(here, steps, window, lambda: None)
    assert train(away, steps, window, lambda: held.append(at_home(away))) == wanted
    assert_equal(state(away), state(here))
    assert len(engine_of(away).home.slots) == BUDGETS[room]
    assert max(held) >= min(BUDGETS[room], NEURONS // 2)
    assert at_home(away) == 0  # `state` has recalled them


Event = Callable[
    [PreTrainedModel, meft.SparseAdamW, dict[str, Tensor]], meft.SparseAdamW | None
]
EVENTS: dict[str, Event] = {}


def event(function: Event) -> Event:
    """Something that happens between a backward and its step."""
    EVENTS[function.__name__] = function
    return function


@event
def nothing(model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any) -> None:
    pass


@event
def gradients_are_cleared(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    adam.zero_grad(set_to_none=False)
    model(**inputs).loss.backward()
    model.zero_grad()
    model(**inputs).loss.backward()


@event
def gradients_are_replaced(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    """By some in host memory, also of rows at home."""
    for adapter in sparse_adapters(model).values():
        assert adapter.neurons.grad is not None
        adapter.neurons.grad = adapter.neurons.grad * 0.3
    model(**inputs).loss.backward()


@event
def a_step_without_clearing(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    """Rows come home whose gradient is in host memory."""
    adam.step()
    model(**inputs).loss.backward()


@event
def an_evaluation(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        model.eval()(**inputs)
    with torch.no_grad():
        model.train()(**inputs)


@event
def rows_are_read(model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any) -> None:
    """All of them, which takes them back with their gradient still to be stepped."""
    sum(p.double().sum() for p in model.parameters())


@event
def rows_are_read_in_inference_mode(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    with torch.inference_mode():
        model.state_dict()
        [p.sum() for p in model.parameters()]


@event
def rows_are_written(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    with torch.no_grad():
        for adapter in sparse_adapters(model).values():
            adapter.neurons[::3] *= 0.5


@event
def the_state_is_saved_and_loaded(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    saved = io.BytesIO()
    torch.save([model.state_dict(), adam.state_dict()], saved)
    saved.seek(0)
    of_model, of_adam = torch.load(saved, weights_only=False)
    model.load_state_dict(of_model)
    adam.load_state_dict(of_adam)


@event
def rows_are_copied(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    copied = copy.deepcopy(model)
    assert torch.equal(all_rows(copied), all_rows(model))


@event
def another_optimizer_takes_over(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> meft.SparseAdamW:
    return meft.SparseAdamW(model.parameters(), lr=3e-2)


@event
def eps_grows(model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any) -> None:
    """So far that idle rows start their factors again, at home too."""
    for group in adam.param_groups:
        group["eps"] = 1e-2


@event
def a_forward_fails(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: dict[str, Tensor]
) -> None:
    def stop(*arguments: Any) -> None:
        raise Stop

    part = model.model.layers[1].mlp
    with part.register_forward_pre_hook(stop), pytest.raises(Stop):
        model(**inputs)


@event
def a_loss_scaler_finds_infinity(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: dict[str, Tensor]
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    adam.zero_grad()
    for factor in (1.0, float("inf")):
        scaler.scale(model(**inputs).loss * factor).backward()
        scaler.unscale_(adam)
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
    model(**inputs).loss.backward()


@event
def a_block_is_frozen(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: dict[str, Tensor]
) -> None:
    """It takes no step, and its rows at home stand still."""
    first, *_ = sparse_adapters(model).values()
    first.neurons.requires_grad_(False)
    first.neurons.grad = None
    model(**inputs).loss.backward()
    adam.step()
    adam.zero_grad()
    first.neurons.requires_grad_(True)
    model(**inputs).loss.backward()


@event
def computation_moves(
    model: PreTrainedModel, adam: meft.SparseAdamW, inputs: Any
) -> None:
    """To a device that has another name."""
    rows = next(iter(sparse_adapters(model).values())).rows
    if not isinstance(rows, meft.sparse.rows.ResidentRows):
        rows.engine.use(torch.device("cpu:0"))  # type: ignore[attr-defined]
        rows.engine.use(torch.device("cpu"))  # type: ignore[attr-defined]


def run(
    events: dict[int, str], num_steps: int, wire: str = "bfloat16", **fields: Any
) -> tuple[list[Tensor], list[float]]:
    """The state and the losses of a run in which something happens in some steps.

    There are two groups of parameters, whose rates differ.
    """
    model = sparse_model(transfer_dtype=wire, device_bytes=75_000, **fields)
    parameters = [p for p in model.parameters() if p.requires_grad]
    half = len(parameters) // 2
    groups = [
        {"params": parameters[:half], "lr": 1e-2, "betas": (0.5, 0.9)},
        {"params": parameters[half:], "lr": 3e-3, "weight_decay": 0.1},
    ]
    adam = meft.SparseAdamW(groups)
    losses = []
    for step, inputs in enumerate(batches(num_steps)):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        if step in events:
            if "placement" not in fields and step == min(events):
                assert at_home(model) > 10
            adam = EVENTS[events[step]](model, adam, inputs) or adam
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
    return state(model), losses


@pytest.mark.parametrize(
    ("name", "wire"),
    slow_but_for(
        [(name, wire) for name in EVENTS for wire in ("bfloat16", "float32")],
        *((name, "bfloat16") for name in EVENTS),
    ),
)
def test_what_happens_between_steps_changes_no_bit(name: str, wire: str) -> None:
    events = {9: name, 15: name}
    here = run(events, 24, wire, placement="resident")
    away = run(events, 24, wire, cache="home")
    assert here[1] == away[1]
    assert_equal(away[0], here[0])


@pytest.mark.slow
@pytest.mark.parametrize("update", ["catchup", "lazy", "dense"])
@pytest.mark.parametrize("seed", range(4))
def test_many_things_that_happen_change_no_bit(seed: int, update: str) -> None:
    generator = np.random.default_rng(seed)
    names = [name for name in EVENTS if name != "nothing"]
    events = {step: str(generator.choice(names)) for step in range(9, 40, 2)}
    here = run(events, 45, update=update, placement="resident")
    away = run(events, 45, update=update, cache="home")
    assert here[1] == away[1]
    assert_equal(away[0], here[0])


def test_another_model_continues_with_the_same_bits() -> None:
    """From the state of a run with rows at home."""
    fields: dict[str, Any] = {"transfer_dtype": "bfloat16", "device_bytes": 75_000}

    def train_on(model: PreTrainedModel, adam: meft.SparseAdamW, first: int) -> None:
        for inputs in list(batches(20))[first : first + 10]:
            model(**inputs).loss.backward()
            adam.step()
            adam.zero_grad()

    found = []
    for cache in ("home", "off"):
        model, later = (sparse_model(**fields, cache=cache) for _ in range(2))
        adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
        train_on(model, adam, 0)
        if cache == "home":
            assert at_home(model) > 10
        states = copy.deepcopy((model.state_dict(), adam.state_dict()))
        following = meft.SparseAdamW(later.parameters(), lr=1e-2)
        later.load_state_dict(states[0])
        following.load_state_dict(states[1])
        for one, optimizer in ((model, adam), (later, following)):
            train_on(one, optimizer, 10)
            found.append(state(one))
    for other in found[1:]:
        assert_equal(found[0], other)


def test_idle_rows_at_home_come_to_rest() -> None:
    """Far more steps after their last gradient than their mean gradient lives."""
    found = []
    for cache in ("off", "home"):
        store, engine = driven(cache, width=16)
        rows, schedule = engine.blocks[0], store.schedule
        assert schedule is not None
        generator = torch.Generator().manual_seed(3)
        for step in range(40):
            wanted = torch.arange(8) if step < 8 else torch.arange(4)
            rows.begin_batch(torch.device("cpu"))
            rows.take(wanted)
            gradient = torch.randn(len(wanted), 16, generator=generator)
            rows.add_gradient(wanted, gradient)
            schedule.add(lr=1e-2, betas=(0.2, 0.9), eps=1e-8, weight_decay=0.1)
            rows.step(*rows.gradient()())
            rows.end_step()
            rows.drop_gradient()
        if cache == "home":
            assert engine.home.slots.held(0)[0].tolist() == list(range(8))
        found.append([store.settled(), *store.moments, store.factors])
    assert_equal(*found)
    assert (found[0][1][4:8] == 0).all()  # m, of rows at rest


def driven(
    cache: str, width: int, rows: int = 64, budget: int = 2**20, blocks: int = 1
) -> tuple[RowStore, Engine]:
    """An engine without a model, whose blocks share a schedule."""
    generator = torch.Generator().manual_seed(1)
    stores = [
        RowStore(torch.randn(rows, width, generator=generator), torch.bfloat16)
        for _ in range(blocks)
    ]
    schedule = Schedule()
    for store in stores:
        store.schedule = schedule
    cfg = config(num_neurons=rows, cache=cache, device_bytes=budget, prefetch=False)
    return stores[0], offload(stores, cfg)


def steps(engine: Engine, batches_of_ids: list[Tensor]) -> int:
    """One step per batch, of which all blocks use the same rows; bytes of the last."""
    schedule = engine.blocks[0].store.schedule
    assert schedule is not None
    for ids in batches_of_ids:
        engine.ledger.clear()
        for rows in engine.blocks:
            rows.begin_batch(torch.device("cpu"))
            rows.take(ids)
        for rows in engine.blocks[::-1]:
            rows.take(ids)
            rows.add_gradient(ids, torch.ones(len(ids), rows.store.width))
        schedule.add(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        for rows in engine.blocks:
            rows.step(*rows.gradient()())
        for rows in engine.blocks:
            rows.end_step()
            rows.drop_gradient()
    return engine.ledger.h2d_bytes + engine.ledger.d2h_bytes


def test_rows_that_stay_at_home_move_their_factors_and_nothing_else() -> None:
    """When read and when stepped; and where they are, which is four bytes a place."""
    _, engine = driven("home", width=256)
    found = steps(engine, [torch.arange(10)] * 12)
    assert len(engine.home.slots.held(0)[0]) == 10
    assert engine.ledger.d2h_bytes == 0
    factors, places = 2 * 96 * 10, 7 * 4 * 10
    assert factors < found <= factors + places < 10 * 256 * 2


@pytest.mark.parametrize("multiple", [1.0, 2.0, 3.0])
def test_it_moves_less_than_a_cache_of_values_where_some_rows_are_used_more(
    multiple: float,
) -> None:
    """At one batch a step, at the same budget, in multiples of the 6 bytes a number
    that values and gradients of all rows take."""
    rows, width, blocks = 64, 512, 2
    generator = np.random.default_rng(0)
    skew = np.arange(1, rows + 1) ** -0.5
    chosen = [
        torch.from_numpy(np.sort(generator.choice(rows, 20, False, skew / skew.sum())))
        for _ in range(40)
    ]
    found = {}
    for cache in ("steps", "home"):
        room = int(multiple * 6 * width * rows * blocks * 8 / 7)
        _, engine = driven(cache, width, rows, room, blocks)
        steps(engine, chosen[:20])
        found[cache] = sum(steps(engine, [ids]) for ids in chosen[20:])
    assert found["home"] < {1.0: 0.85, 2.0: 0.55, 3.0: 0.35}[multiple] * found["steps"]


@pytest.mark.parametrize("room", [1, 10_000, 75_000, 300_000, 2**20])
def test_slots_are_within_the_budget(room: int) -> None:
    model = sparse_model(cache="home", device_bytes=room, transfer_dtype="bfloat16")
    train(model, 3, 1, lambda: None)
    engine = engine_of(model)
    values, gradients, states = engine.slabs
    assert sum(slab.nbytes for slab in engine.slabs) <= room * 7 // 8
    assert len(gradients) == states.shape[1] == len(engine.home.slots)
    assert not len(gradients) or len(values) == NEURONS


def test_a_row_comes_home_when_it_has_paid_for_the_way() -> None:
    """Its uses fade, by half in 22 steps."""
    slots = HomeSlots(num_blocks=2, rows_per_block=4, num_slots=2, cost=3.0)
    may = np.array([True, True])
    for _ in range(3):
        slots.count(1, np.array([0, 2]))
    assert slots.exchange(may, 9) == ([], [])  # as much as it costs
    slots.count(1, np.array([2]))
    assert slots.exchange(np.array([True, False]), 9) == ([], [])
    leaving, entering = slots.exchange(may, 9)
    assert leaving == []
    assert [(m.block, m.ids.tolist(), m.slots.tolist()) for m in entering] == [
        (1, [2], [0])
    ]
    for moving in entering:
        slots.occupy(*moving)
    assert slots.held(1)[0].tolist() == [2]
    assert FADE**22 == pytest.approx(0.5, abs=0.01)


def test_rows_do_not_change_places_for_a_few_uses_more() -> None:
    """Both ways have to be paid for."""
    slots = HomeSlots(num_blocks=1, rows_per_block=4, num_slots=1, cost=2.0)
    may = np.array([True])
    one, other = np.array([1]), np.array([3])
    for _ in range(5):
        slots.count(0, one)
    ((_, _, places),) = slots.exchange(may, 1)[1]
    slots.occupy(0, one, places)
    for _ in range(9):
        slots.count(0, other)
    assert slots.exchange(may, 1) == ([], [])
    slots.count(0, other)
    (leaves,), (enters,) = slots.exchange(may, 1)
    assert leaves.ids.tolist() == [1]
    assert enters.ids.tolist() == [3]
    assert leaves.slots.tolist() == enters.slots.tolist()


def test_no_more_rows_move_at_once_than_there_is_room_for() -> None:
    slots = HomeSlots(num_blocks=1, rows_per_block=9, num_slots=9, cost=1.0)
    for uses in range(9):
        slots.count(0, np.arange(uses, 9))
        slots.count(0, np.arange(9))
    ((_, ids, _),) = slots.exchange(np.array([True]), 3)[1]
    assert ids.tolist() == [6, 7, 8]


def test_a_home_without_experts_is_refused() -> None:
    """All rows would go to the host and back for each batch. Where every neuron
    answers, none is scored."""
    with pytest.raises(ConfigError, match=r"`cache` is 'home', but without experts"):
        config(cache="home", num_experts=0)
    config(cache="home", num_experts=0, top_k_neurons=64)
    config(cache="home", num_experts=0, placement="resident")
