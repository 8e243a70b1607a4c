"""Rows of sparse adapters train by `SparseAdamW`, as torch's AdamW would train them if
they were an ordinary parameter; every other optimizer is refused with nothing moved."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import meft
from library.sparse import HIDDEN, batches, lone_adapter, sparse_model
from library.sparse import config as sparse_config
from marks import slow_but_for
from meft.errors import ConfigError, UnsupportedCallError
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.row_grad import RowGrad
from meft.testing import tolerance


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_unmoved(model: nn.Module, before: list[Tensor]) -> None:
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


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


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Single rows for `Trainer`."""

    def __init__(self) -> None:
        self.rows = [
            {name: tensor[i] for name, tensor in inputs.items()}
            for inputs in batches(8)
            for i in range(2)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **{"max_steps": 2, "save_strategy": "no", **options},
    )


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_trainers_own_optimizers_are_refused_before_they_move_anything(
    name: str, tmp_path: Path
) -> None:
    """Those that need a package that is not here are refused by transformers."""
    model = sparse_model(depth=1)
    before = copies(model)
    options = {"optim_target_modules": ["mlp"]} if "layerwise" not in name else {}
    trainer = Trainer(
        model, arguments(tmp_path, optim=name, **options), train_dataset=Texts()
    )
    refusals = (UnsupportedCallError, ImportError, ValueError, RuntimeError)
    with pytest.raises(refusals) as caught:
        trainer.train()
    assert_unmoved(model, before)
    assert trainer.state.global_step == 0
    if name in {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"}:
        assert isinstance(caught.value, UnsupportedCallError)
        assert "optimizer_cls_and_kwargs=meft.optimizer_cls_and_kwargs(args)" in str(
            caught.value
        )


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_another_optim_of_the_arguments_is_refused(name: str, tmp_path: Path) -> None:
    """Implementations of torch's AdamW, the default among them, mean `SparseAdamW`."""
    options = {"optim_target_modules": ["mlp"]} if "layerwise" not in name else {}
    args = arguments(tmp_path, optim=name, **options)
    if name.startswith("adamw_torch") and "bit" not in name:
        assert meft.optimizer_cls_and_kwargs(args)[0] is meft.SparseAdamW
        return
    with pytest.raises(ConfigError, match=rf"got '{name}'.*AdamW only.*Leave `optim`"):
        meft.optimizer_cls_and_kwargs(args)


def test_options_for_trainers_own_optimizer_are_refused(tmp_path: Path) -> None:
    """The message has those that do work."""
    assert meft.optimizer_cls_and_kwargs(arguments(tmp_path))[1]["lr"] == 1e-2
    args = arguments(tmp_path, optim_args="amsgrad=True")
    with pytest.raises(ConfigError, match=r"'amsgrad=True'.*`adam_beta1`"):
        meft.optimizer_cls_and_kwargs(args)


def test_trainer_trains_rows_by_its_own_arguments(tmp_path: Path) -> None:
    """As a loop with the same rates, betas, eps, decay and clipping does."""
    args = arguments(
        tmp_path,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-5,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
    )
    model = sparse_model()
    trainer = Trainer(
        model,
        args,
        train_dataset=Texts(),
        optimizer_cls_and_kwargs=meft.optimizer_cls_and_kwargs(args),
    )
    seen: list[Any] = []
    step = trainer.training_step

    def noting(model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return step(model, inputs, *rest)

    trainer.training_step = noting  # type: ignore[method-assign, assignment]
    trainer.train()

    twin = sparse_model()
    optimizer = meft.SparseAdamW(
        twin.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1
    )
    for inputs in seen:
        twin(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


def test_the_best_checkpoint_is_loaded_whole(tmp_path: Path) -> None:
    """By force the second of four is the best: rows and routers are those of then."""

    class SecondIsBest(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": abs(self.state.global_step - 2.0)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            then[self.state.global_step] = [p.detach().clone() for p in trained]
            super().save_model(*args, **kwargs)

    then: dict[int, list[Tensor]] = {}
    model = sparse_model()
    trained = trainable(model)
    args = arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = SecondIsBest(
        model,
        args,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        optimizer_cls_and_kwargs=meft.optimizer_cls_and_kwargs(args),
    )
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    assert sorted(then) == [1, 2, 3, 4]
    for parameter, best, last in zip(trained, then[2], then[4], strict=True):
        assert torch.equal(parameter, best)
        assert not torch.equal(parameter, last)


# Held against torch's AdamW on an ordinary parameter.

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


@pytest.mark.parametrize("cache", ["window", "steps", "off"])
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


@pytest.mark.parametrize("cache", ["window", "steps"])
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
