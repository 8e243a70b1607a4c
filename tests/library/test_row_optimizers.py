"""Which optimizers may train rows of sparse adapters; every other one is refused with
nothing moved."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import meft
from library.parameters import assert_unmoved, copies, trainable
from library.sparse import HIDDEN, batches, lone_adapter, sparse_model
from library.sparse import config as sparse_config
from marks import slow_but_for
from meft.errors import ConfigError, UnsupportedCallError
from meft.sparse.adapter import sparse_adapters

OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.Muon)
} | {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, fused=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, foreach=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    "AdamW, of rows only": lambda p: torch.optim.AdamW([q for q in p if len(q) == 64]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_optimizer_is_refused_before_it_moves_anything(other: str) -> None:
    """Rows and other parameters stand still, and the message says what to take."""
    model = sparse_model(depth=1)
    before = copies(model)
    optimizer = OTHERS[other](trainable(model))
    (inputs,) = batches(1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    closure()
    with pytest.raises(UnsupportedCallError, match=r"meft\.SparseAdamW"):
        optimizer.step(closure)
    assert_unmoved(model, before)


def test_an_optimizer_of_other_parameters_is_none_of_our_business() -> None:
    model = sparse_model(depth=1)
    router = sparse_adapters(model)["model.layers.0.parallel_adapter"].router
    assert router is not None
    before = router.detach().clone()
    optimizer = torch.optim.SGD([router], lr=1.0)
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert not torch.equal(router, before)


@pytest.mark.parametrize("cache", ["window", "steps", "home", "off"])
@pytest.mark.parametrize("device_bytes", slow_but_for([2**30, 9000], 9000))
def test_optimizers_of_different_blocks_do_not_disturb_each_other(
    cache: str, device_bytes: int
) -> None:
    """Two that share a cache, stepped in turn, are one of all."""
    fields: dict[str, Any] = {"cache": cache, "device_bytes": device_bytes}
    apart, together = sparse_model(**fields), sparse_model(**fields)
    half = len(trainable(apart)) // 2
    parts = trainable(apart)[:half], trainable(apart)[half:]
    several = [meft.SparseAdamW(part, lr=1e-2) for part in parts]
    one = meft.SparseAdamW(trainable(together), lr=1e-2)
    for inputs in batches(4):
        for model in (apart, together):
            model(**inputs).loss.backward()
        for optimizer in (*several, one):
            optimizer.step()
        for optimizer in (*several, one):
            optimizer.zero_grad()
    for mine, wanted in zip(trainable(apart), trainable(together), strict=True):
        assert torch.equal(mine, wanted)


def test_of_two_optimizers_over_the_same_rows_the_earlier_one_is_refused() -> None:
    """Before it moves anything; so is one whose model or self is a copy."""
    model = sparse_model(depth=1)
    first = meft.SparseAdamW(model.parameters())
    second = meft.SparseAdamW(model.parameters())
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    before = copies(model)
    with pytest.raises(UnsupportedCallError, match="belong to another optimizer"):
        first.step()
    assert_unmoved(model, before)
    copied = copy.deepcopy(second)
    for group in copied.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.ones(parameter.shape)
    with pytest.raises(UnsupportedCallError, match="belong to another optimizer"):
        copied.step()
    second.step()
    assert not torch.equal(trainable(model)[0], before[0])


@pytest.mark.parametrize("cache", ["window", "steps", "home"])
def test_a_new_optimizer_starts_at_its_first_step(cache: str) -> None:
    """Rows that the device still has from an earlier optimizer's time are void, also
    where weight decay has given them the number of a step that both have taken."""
    model, fresh = (sparse_model(depth=1, cache=cache) for _ in range(2))
    data = list(batches(6))

    def run(model: PreTrainedModel, some: list[dict[str, Tensor]]) -> None:
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for inputs in some:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(model, data[:3])
    fresh.load_state_dict(model.state_dict())
    run(model, data[3:])
    run(fresh, data[3:])
    for one, other in zip(trainable(model), trainable(fresh), strict=True):
        assert torch.equal(one, other)


def test_rows_added_later_train_from_then_on() -> None:
    model = sparse_model(depth=1)
    neurons = sparse_adapters(model)["model.layers.0.parallel_adapter"].neurons
    optimizer = meft.SparseAdamW([p for p in trainable(model) if p is not neurons])
    optimizer.add_param_group({"params": [neurons], "lr": 1e-2})
    before = neurons.detach().clone()
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert not torch.equal(neurons, before)


def test_a_refused_step_moves_nothing_in_any_group() -> None:
    """A learning rate that is not a number in the last group is found before the first
    group has taken its step; with a finite one, training continues at step 1."""
    adapters = [lone_adapter(sparse_config()) for _ in range(2)]
    ordinary = nn.Parameter(torch.ones(3))
    groups = [{"params": [p]} for p in (ordinary, *(a.neurons for a in adapters))]
    optimizer = meft.SparseAdamW(groups, lr=1e-2)
    for adapter in adapters:
        adapter(torch.ones(3, HIDDEN)).square().sum().backward()
    ordinary.grad = torch.ones(3)
    before = [a.neurons.detach().clone() for a in adapters]
    optimizer.param_groups[2]["lr"] = float("nan")
    with pytest.raises(ConfigError, match="`lr` of this step is nan"):
        optimizer.step()
    assert torch.equal(ordinary, torch.ones(3))
    for adapter, rows in zip(adapters, before, strict=True):
        assert torch.equal(adapter.neurons, rows)
        assert adapter.rows.store.schedule is None
    optimizer.param_groups[2]["lr"] = 1e-2
    optimizer.step()
    for adapter, rows in zip(adapters, before, strict=True):
        assert not torch.equal(adapter.neurons, rows)
        assert adapter.rows.store.schedule is not None
        assert adapter.rows.store.schedule.step == 1


@pytest.mark.parametrize(
    ("saved", "given"), [("lazy", "catchup"), ("lazy", "dense"), ("catchup", "lazy")]
)
def test_the_state_of_a_lazy_run_is_for_a_lazy_run(saved: str, given: str) -> None:
    first, second = sparse_model(update=saved), sparse_model(update=given)
    state = meft.SparseAdamW(first.parameters()).state_dict()
    before = copies(second)
    with pytest.raises(ConfigError, match=f"update='{saved}'.*'{given}'"):
        meft.SparseAdamW(second.parameters()).load_state_dict(state)
    assert_unmoved(second, before)


def test_the_states_of_catchup_and_dense_runs_are_the_same() -> None:
    """A run may go on with the other, to the same bits."""
    runs = []
    for updates in (("catchup", "catchup"), ("catchup", "dense"), ("dense", "catchup")):
        data = list(batches(6))
        model = sparse_model(update=updates[0])
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
        for index, inputs in enumerate(data):
            if index == 3:
                last, states = model, (model.state_dict(), optimizer.state_dict())
                states = copy.deepcopy(states)
                model = sparse_model(update=updates[1])
                model.load_state_dict(states[0])
                optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
                optimizer.load_state_dict(states[1])
                del last
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in trainable(model)])
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_data_parallel_training_in_one_process_works_and_in_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = torch.distributed
    group.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, plain = sparse_model(depth=1), sparse_model(depth=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
        made = [meft.SparseAdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
        for inputs in batches(2):
            for each, optimizer in zip((wrapped, plain), made, strict=True):
                each(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for one, other in zip(trainable(model), trainable(plain), strict=True):
            assert torch.equal(one, other)
        monkeypatch.setattr(group, "get_world_size", lambda: 2)
        with pytest.raises(UnsupportedCallError, match="one process"):
            model(**inputs)
    finally:
        group.destroy_process_group()


def test_fully_sharded_training_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    group = torch.distributed
    group.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = group.device_mesh.init_device_mesh("cpu", (1,))
        model: Any = fully_shard(sparse_model(depth=1), mesh=mesh)
        (inputs,) = batches(1)
        with pytest.raises(UnsupportedCallError, match="Sharding"):
            model(**inputs)
    finally:
        group.destroy_process_group()
