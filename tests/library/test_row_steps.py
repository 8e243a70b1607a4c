"""`SparseAdamW` trains rows as torch's AdamW trains an ordinary parameter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from library.parameters import trainable
from library.sparse import HIDDEN, batches, lone_adapter, sparse_model
from library.sparse import config as sparse_config
from meft.errors import ConfigError
from meft.sparse.adapter import SparseAdapter
from meft.sparse.row_grad import RowGrad
from meft.testing import tolerance

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.7, 0.95)},
    "eps": {"eps": 1e-3},
}

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], None]] = {}


def schedule(
    function: Callable[[torch.optim.Optimizer, int], None],
) -> Callable[[torch.optim.Optimizer, int], None]:
    SCHEDULES[function.__name__] = function
    return function


@schedule
def changing_eps(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["eps"] = 10.0 ** -(3 + step % 5)


@schedule
def changing_decay(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 3)


@schedule
def changing_betas(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * (step % 4), 0.99)


@schedule
def rate_of_zero_then_raised(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.0 if step < 4 else 1e-2


@schedule
def rate_as_a_tensor(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2 / (1 + step))


def dense_gradient(adapter: SparseAdapter) -> Tensor:
    grad = adapter.neurons.grad
    assert isinstance(grad, RowGrad)
    return grad.to_dense()


def held_against_torch(
    adapter: SparseAdapter,
    act: Callable[[torch.optim.Optimizer, int], None],
    steps: int = 12,
    **settings: Any,
) -> None:
    """Both are given the gradients that the adapter has; idle rows differ by step."""
    twin = nn.Parameter(adapter.neurons.detach().clone())
    mine = meft.SparseAdamW([adapter.neurons], **{"lr": 1e-2, **settings})
    options = {"lr": 1e-2, "weight_decay": 0.0, **settings}
    theirs = torch.optim.AdamW([twin], **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(3, HIDDEN, generator=generator)
        adapter(x).square().sum().backward()
        twin.grad = dense_gradient(adapter)
        assert (twin.grad == 0).all(1).any()
        for optimizer in (mine, theirs):
            act(optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
    found = adapter.neurons.detach().clone()
    torch.testing.assert_close(
        found, twin.detach(), rtol=tolerance(torch.float32, 1), atol=1e-5
    )


@pytest.mark.parametrize("update", ["dense", "catchup"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_follow_the_settings_of_their_group(settings: str, update: str) -> None:
    adapter = lone_adapter(sparse_config(update=update))
    held_against_torch(adapter, lambda optimizer, step: None, **SETTINGS[settings])


@pytest.mark.parametrize("update", ["dense", "catchup"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_follow_the_values_of_each_step(name: str, update: str) -> None:
    held_against_torch(lone_adapter(sparse_config(update=update)), SCHEDULES[name])


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_rows_follow_a_scheduler_that_cycles_betas(kind: str) -> None:
    made: dict[int, Any] = {}

    def act(optimizer: torch.optim.Optimizer, step: int) -> None:
        if id(optimizer) not in made:
            if kind == "OneCycleLR":
                made[id(optimizer)] = torch.optim.lr_scheduler.OneCycleLR(
                    optimizer, max_lr=1e-2, total_steps=13
                )
            else:
                made[id(optimizer)] = torch.optim.lr_scheduler.CyclicLR(
                    optimizer, 1e-3, 1e-2, step_size_up=3
                )
        elif step:
            made[id(optimizer)].step()
        betas.add(optimizer.param_groups[0]["betas"])

    betas: set[tuple[float, float]] = set()
    held_against_torch(lone_adapter(sparse_config()), act)
    assert len(betas) > 3


def test_a_parameter_without_gradient_takes_no_step() -> None:
    """As in torch: its block's clock stands still, and that of the others goes on."""
    adapters = [lone_adapter(sparse_config()) for _ in range(2)]
    twins = [nn.Parameter(a.neurons.detach().clone()) for a in adapters]
    mine = meft.SparseAdamW([a.neurons for a in adapters], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(9):
        for index, (adapter, twin) in enumerate(zip(adapters, twins, strict=True)):
            if step % 3 == index:
                continue
            x = torch.randn(3, HIDDEN, generator=generator)
            adapter(x).square().sum().backward()
            twin.grad = dense_gradient(adapter)
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
        if step == 4:  # also through the state, to the same bits
            state = copy.deepcopy(mine.state_dict())
            mine.load_state_dict(state)
    for adapter, twin in zip(adapters, twins, strict=True):
        found = adapter.neurons.detach().clone()
        torch.testing.assert_close(found, twin.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", ["dense", "catchup", "lazy"])
def test_a_parameter_moved_to_another_group_follows_that(update: str) -> None:
    """In the middle of a run, as torch's AdamW allows: each counts its own steps."""
    adapters = [lone_adapter(sparse_config(update=update)) for _ in range(2)]
    twins = [nn.Parameter(a.neurons.detach().clone()) for a in adapters]
    mine = meft.SparseAdamW([a.neurons for a in adapters], lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    for step in range(12):
        for optimizer in (mine, theirs):
            (first, *others) = optimizer.param_groups
            if step == 5:
                moved = {**first, "params": [first["params"].pop()], "lr": 1e-4}
                optimizer.param_groups.append(moved)
            if step == 9:
                first["params"] += others.pop()["params"]
                optimizer.param_groups.pop()
        for adapter, twin in zip(adapters, twins, strict=True):
            gradient = torch.randn_like(twin)
            adapter.neurons.grad, twin.grad = gradient.clone(), gradient
        mine.step()
        theirs.step()
    for adapter, twin in zip(adapters, twins, strict=True):
        schedule = adapter.rows.store.schedule
        assert schedule is not None
        assert schedule.step == 12
        found = adapter.neurons.detach().clone()
        torch.testing.assert_close(found, twin.detach(), rtol=1e-5, atol=1e-6)


def test_a_step_with_a_closure_takes_the_gradient_that_it_computes() -> None:
    """As torch's: gradients are enabled inside, its loss is returned, and the rows move
    as they do with the same gradient computed before the step. The gradient is still
    there afterwards."""
    moved = []
    for uses_closure in (True, False):
        model, data = sparse_model(depth=1), batches(2)
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)

        def closure(model: Any = model, data: Any = data) -> float:
            loss = model(**next(data)).loss
            loss.backward()
            return float(loss.detach())

        for _ in range(2):
            optimizer.zero_grad()
            if uses_closure:
                loss = optimizer.step(closure)
                assert loss is not None
                assert loss > 0
            else:
                closure()
                assert optimizer.step() is None
            assert all(p.grad is not None for p in trainable(model))
        moved.append(trainable(model))
    for one, other in zip(*moved, strict=True):
        assert torch.equal(one, other)


def test_rows_share_a_schedule_while_they_take_the_same_steps() -> None:
    """One per group, also after its state was saved and loaded; a parameter that missed
    a step has a schedule of its own from then on."""
    adapters = [lone_adapter(sparse_config()) for _ in range(3)]
    neurons = [adapter.neurons for adapter in adapters]
    optimizer = meft.SparseAdamW(
        [{"params": neurons[:2]}, {"params": neurons[2:]}], lr=1e-2
    )

    def step(*some: int) -> list[int]:
        """Which parameter's schedule each one has, the first of those that share it."""
        optimizer.zero_grad()
        for index in some:
            adapters[index](torch.ones(3, HIDDEN)).square().sum().backward()
        optimizer.step()
        return kinds()

    def kinds() -> list[int]:
        schedules = [id(adapter.rows.store.schedule) for adapter in adapters]
        return [schedules.index(each) for each in schedules]

    assert step(0, 1, 2) == step(0, 1, 2) == [0, 0, 2]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kinds() == step(0, 1) == [0, 0, 2]
    assert step(0, 2) == [0, 1, 2]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kinds() == [0, 1, 2]
    steps = [adapter.rows.store.schedule.step for adapter in adapters]  # type: ignore[union-attr]
    assert steps == [4, 3, 3]


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_that_rows_do_not_have_are_refused(option: str) -> None:
    adapter = lone_adapter(sparse_config())
    with pytest.raises(ConfigError, match=f"`{option}` is True"):
        meft.SparseAdamW([{"params": [adapter.neurons], option: True}])


@pytest.mark.parametrize("update", ["dense", "catchup", "lazy"])
def test_values_that_let_idle_rows_grow_are_refused_where_rows_take_idle_steps(
    update: str,
) -> None:
    """betas[0]^2 above betas[1]: the momentum of an idle row outlives its variance."""
    model = sparse_model(update=update)
    if update == "lazy":
        meft.SparseAdamW(model.parameters(), betas=(0.9, 0.8))
        return
    with pytest.raises(ConfigError, match="would grow instead of fade"):
        meft.SparseAdamW(model.parameters(), betas=(0.9, 0.8))


@pytest.mark.parametrize("update", ["dense", "catchup"])
def test_rows_go_on_from_a_value_that_was_written(update: str) -> None:
    """With the moments that they have, as a parameter under torch's AdamW does."""
    adapter = lone_adapter(sparse_config(update=update))

    def act(optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 5:
            with torch.no_grad():
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.mul_(1.5)

    held_against_torch(adapter, act, weight_decay=0.1)
