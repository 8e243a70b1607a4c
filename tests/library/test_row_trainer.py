"""`Trainer` trains rows of sparse adapters by `SparseAdamW`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import meft
from library.parameters import assert_unmoved, copies, trainable
from library.sparse import Texts, sparse_model
from marks import slow_but_for
from meft.errors import ConfigError, UnsupportedCallError


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


@pytest.mark.parametrize(
    "name",
    slow_but_for(
        [each.value for each in OptimizerNames],
        *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"),
        *("lomo", "galore_adamw", "schedule_free_adamw", "stable_adamw"),
    ),
)
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
