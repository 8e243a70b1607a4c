"""What one optimizer step makes of several micro-batches."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.tiny import FAMILIES, SHAPE, cell, classifier
from harness.tiny import batch as labelled_batch
from meft_bench.child.tasks.batches import IGNORED, Batch, Example, collate
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import METHODS, load

NUM_TARGETS = (2, 6, 3, 2, 7, 1, 2, 1)
"""Of each row: the tokens of its answer."""


def rows() -> list[Example]:
    """Answers of different lengths, some after a prompt of three tokens and some after
    none, whose first token is a target of an encoder-decoder only."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, num in enumerate(NUM_TARGETS):
        prompt = 3 if index % 3 else 0
        tokens = torch.randint(3, 50, (prompt + num,), generator=generator).tolist()
        label = [IGNORED] * prompt + tokens[prompt:]
        found.append(
            Example(token_ids=tokens, segment_ids=[0] * len(tokens), label=label)
        )
    return found


def micro_batches(size: int) -> list[Batch]:
    """The same eight rows, so many at a time."""
    every = rows()
    return [collate(every[i : i + size], 1) for i in range(0, len(every), size)]


def model_of(here: Cell, family: str = "llama") -> Any:
    """A tiny language model, the same weights each time, without dropout."""
    fields: dict[str, Any] = SHAPE | FAMILIES[family] | {"pad_token_id": 1}
    config: Any = CONFIG_MAPPING[family](**fields)
    config.dropout = config.attention_dropout = config.activation_dropout = 0.0
    torch.manual_seed(0)
    kind: Any = AutoModelForSeq2SeqLM if family == "bart" else AutoModelForCausalLM
    return load(METHODS[here.method])(kind.from_config(config), here).train()


def gradients_and_loss(
    model: Any, batches: Sequence[Batch], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], float]:
    """What the optimizer is given, before clipping, and the loss that is reported."""
    stepper = Stepper(model, cell())
    trained = [p for p in stepper.model.parameters() if p.requires_grad]
    found: list[Tensor] = []

    def keep(parameters: list[Tensor], norm: float) -> None:
        found.extend(p.grad.clone() for p in trained if p.grad is not None)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    loss = stepper.step(batches, learning_rate=0.0)
    monkeypatch.undo()
    return found, loss


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "method"), [("llama", "full"), ("bart", "full"), ("llama", "lora")]
)
def test_every_target_token_of_a_window_counts_the_same(
    family: str, method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of any size give the gradients and the loss of one large batch."""
    (wanted, wanted_loss), (found, loss) = (
        gradients_and_loss(
            model_of(cell(method=method), family), micro_batches(num), monkeypatch
        )
        for num in (8, size)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "full"), ("bart", "full"), ("llama", "lora")]
)
def test_a_micro_batch_without_a_target_counts_nothing(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own mean is not-a-number; the step's loss and gradients are those of the
    other micro-batches."""
    others = micro_batches(4)
    silent = {name: tensor.clone() for name, tensor in others[0].items()}
    silent["labels"].fill_(IGNORED)
    (wanted, wanted_loss), (found, loss) = (
        gradients_and_loss(model_of(cell(method=method), family), batches, monkeypatch)
        for batches in (others, [others[0], silent, others[1]])
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    _, nothing = gradients_and_loss(model_of(cell(), family), [silent], monkeypatch)
    assert math.isnan(nothing)


class KeepGradients(TrainerCallback):
    """Copies the gradients that the optimizer of a `Trainer` is about to use."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(
        self, *args: Any, model: Any = None, **others: Any
    ) -> None:
        self.found = [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_window_has_the_gradients_that_transformers_trainer_computes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches of two rows, whose answers have 1 to 7 tokens."""
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    stepper = Stepper(model_of(cell(), family), cell())
    trainer = Trainer(
        model=stepper.model,
        args=arguments,
        train_dataset=rows(),
        data_collator=lambda some: stepper.to_device(collate(some, 1)),
        callbacks=[keep],
    )
    trainer.train()
    model = model_of(cell(), family)
    found, _ = gradients_and_loss(model, micro_batches(2), monkeypatch)
    torch.testing.assert_close(found, keep.found, rtol=1e-4, atol=1e-6)


def test_a_window_of_micro_batches_with_equally_many_targets_is_their_plain_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As before: to the last bit, so that memory probes and timings are unchanged."""
    whole = micro_batches(8)[0]
    found, _ = gradients_and_loss(model_of(cell()), [whole] * 3, monkeypatch)
    stepper = Stepper(model_of(cell()), cell())
    for _ in range(3):
        (stepper.loss(stepper.to_device(whole)) / 3).backward()
    trained = [p for p in stepper.model.parameters() if p.requires_grad]
    for gradient, parameter in zip(found, trained, strict=True):
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_micro_batches_of_a_classifier_count_the_same() -> None:
    """Each has as many labels as the others, whatever the lengths of its texts."""
    stepper = Stepper(classifier(), cell())
    assert stepper.divisors([labelled_batch(seq_len=n) for n in (2, 8, 5)]) == [3, 3, 3]
