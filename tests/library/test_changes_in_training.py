"""What a training step may change between forward and backward, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import meft
from library.models import batch, classifier, gradients, reversible
from library.training import (
    Replaced,
    assert_same,
    built,
    families,
    stack_of,
    stored_gradients,
    trainable,
    variants,
)

Change = Callable[[PreTrainedModel], None]


def _step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Change:
    """One step on the adapters; a change to the head above would be torch's to find."""

    def change(model: PreTrainedModel) -> None:
        adapters = list(stack_of(model).adapters.parameters())
        for parameter in adapters:
            parameter.grad = torch.ones_like(parameter)
        kind(adapters, lr=1e-2, **options).step()

    return change


def _moving_average(model: PreTrainedModel) -> None:
    with torch.no_grad():
        stack_of(model)[0].attention.self.query.weight.lerp_(torch.zeros(()), 1e-3)


def _buffer(model: PreTrainedModel) -> None:
    stack_of(model)[1].get_buffer("seen").add_(1)


def _unfreezing(model: PreTrainedModel) -> None:
    stack_of(model)[1].output.LayerNorm.requires_grad_(True)


def _hidden_change(model: PreTrainedModel) -> None:
    stack_of(model)[2].output.dense.bias.data[0] += 0.1


def _replacement(model: PreTrainedModel) -> None:
    dense = stack_of(model)[0].output.dense
    dense.weight = nn.Parameter(dense.weight.clone(), requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        _step(torch.optim.AdamW),
        _step(torch.optim.SGD, foreach=False),
        _moving_average,
        _buffer,
        _unfreezing,
        _replacement,
    ],
    ids=["adamw", "sgd", "average", "buffer", "unfreezing", "replacement"],
)
@variants
def test_changes_between_forward_and_backward_are_refused(
    variant: str, change: Change
) -> None:
    """Of trainable and frozen weights and of buffers alike: a recompute would use the
    new ones. A new forward is fine."""
    model = reversible(3, dropout=0.1, variant=variant)
    stack_of(model)[1].register_buffer("seen", torch.zeros(()))
    loss = model(**batch()).loss
    change(model)
    with pytest.raises(meft.UnsupportedCallError, match="between forward and backward"):
        loss.backward()
    rebuilt = gradients(model, batch())
    assert_same(rebuilt, stored_gradients(model, batch()))


def test_changes_elsewhere_have_no_effect() -> None:
    """Weights outside of the blocks may change, as far as autograd allows it."""
    model = reversible(2, variant="meft1")
    loss = model(**batch()).loss
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1.0)
    loss.backward()


def test_a_block_that_changes_its_own_buffers_is_refused() -> None:
    """Running statistics would be updated once more by every recompute."""
    model = reversible(2, variant="meft1")
    block = stack_of(model)[0]
    block.register_buffer("calls", torch.zeros(()))
    Replaced(block.output.LayerNorm, lambda calls: float(block.calls.add_(1)) * 0)
    loss = model(**batch()).loss
    with pytest.raises(meft.UnsupportedCallError, match="running statistics"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "block"),
    [(_step(torch.optim.AdamW, fused=True), 3), (_hidden_change, 2)],
    ids=["fused", "data"],
)
def test_a_change_that_torch_does_not_count_is_found_where_it_matters(
    change: Change, block: int
) -> None:
    """Torch does not count changes by fused optimizers or through `.data`. They are
    found in what the block gives, so by its number, and no gradient is left."""
    model = reversible(4, variant="meft1")
    loss = model(**batch()).loss
    change(model)
    stack_of(model).zero_grad()
    with pytest.raises(meft.ReconstructionError, match=f"input of block {block} is"):
        loss.backward()
    adapters = stack_of(model).adapters.parameters()
    assert all(parameter.grad is None for parameter in adapters)


@variants
def test_a_second_backward_only_on_request(variant: str) -> None:
    """`retain_graph=True` gives the same bits again, any number of times; without it
    torch refuses."""
    model = reversible(3, dropout=0.1, variant=variant)
    parameters = list(trainable(model).values())
    loss = model(**batch()).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    third = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@families
def test_gradient_checkpointing_is_refused(family: str, tmp_path: Path) -> None:
    """Switched on before conversion, after it, or by the `Trainer`: two ways to save
    the same memory would run every block three times."""
    config = meft.ReversibleConfig(variant="meft1")
    checkpointed = classifier(1)
    checkpointed.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedModelError, match="gradient checkpointing"):
        meft.make_reversible(checkpointed, config)

    model, inputs = built(family, variant="meft1")
    model.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedCallError, match="activation_checkpointing_dis"):
        model(**inputs)
    model.activation_checkpointing_disable()
    model(**inputs).loss.backward()

    model, inputs = built(family, variant="meft1")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        activation_checkpointing=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = [{name: tensor[0] for name, tensor in inputs.items()}]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    with pytest.raises(meft.UnsupportedCallError, match="gradient checkpointing"):
        trainer.train()
