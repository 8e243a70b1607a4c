"""Models, gradients and comparisons for tests of training loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import meft
from library.models import VOCAB, batch, gradient, gradients, reversible
from marks import slow_but_for
from meft.reversible.blocks import ReversibleBlocks, find_stacks

Gradients = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]
variants = pytest.mark.parametrize(
    "variant", slow_but_for(["meft1", "meft2", "meft3"], "meft1", "meft3")
)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
families = pytest.mark.parametrize("family", ["bert", "llama"])


def llama(depth: int = 3, **config: Any) -> LlamaForCausalLM:
    """A small reversible causal language model in training mode, dropout on."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            attention_dropout=0.1,
        )
    )
    torch.manual_seed(1)
    options = {"bottleneck_size": 3, **config}
    meft.make_reversible(model, meft.ReversibleConfig(**options))
    model.train()
    return model


def built(family: str, **config: Any) -> tuple[PreTrainedModel, Batch]:
    """A model of a family, and a batch for it."""
    rows = batch()
    if family == "bert":
        return reversible(3, dropout=0.1, **config), rows
    return llama(**config), rows | {"labels": rows["input_ids"]}


def stack_of(model: PreTrainedModel) -> ReversibleBlocks:
    (stack,) = find_stacks(model).values()
    return stack


def trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def left(model: PreTrainedModel) -> Gradients:
    """What backwards have left at the trainable parameters."""
    return {name: gradient(p) for name, p in trainable(model).items()}


def stored_gradients(model: PreTrainedModel, inputs: Batch) -> Gradients:
    """Those of the twin."""
    stack = stack_of(model)
    stack.backward_pass = "store"
    expected = gradients(model, inputs)
    stack.backward_pass = "rebuild"
    return expected


def assert_same(got: Gradients, expected: Gradients) -> None:
    """Every bit of every tensor."""
    assert got.keys() == expected.keys()
    assert got
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


batch_without_reseeding = batch()
"""Made once: `batch()` seeds torch, which would give every step the same masks."""


class Replaced:
    """Adds what `extra` says to a module's output, and counts its calls. Not a hook: a
    block with forward hooks is always run with a graph."""

    def __init__(self, module: nn.Module, extra: Callable[[int], float]) -> None:
        self._extra = extra
        self.calls = 0
        self._plain = module.forward
        module.forward = self

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self._plain(*args)
        return output + self._extra(self.calls)
