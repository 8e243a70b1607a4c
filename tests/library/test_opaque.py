"""Blocks whose halves are unknown, which a model without our adapters calls itself."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import meft
from library.families import (
    HIDDEN,
    LABELS,
    VOCAB,
    assert_same_bits,
    gradients,
    text,
    twin_of,
)
from meft.backbone import unlisted
from meft.reversible.blocks import find_stacks

WITHOUT = meft.ReversibleConfig(adapter=None)
NEAR = meft.ReversibleConfig(adapter=None, lost_bits=16)


class Gated(GradientCheckpointingLayer):
    """No two halves: a gate decides between the input and a mixture of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.mix = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.drop = nn.Dropout(0.2)

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        gate = self.gate(hidden).sigmoid()
        mixed = self.drop(self.mix(hidden.cumsum(1)).tanh()) * scale
        return gate * hidden + (1 - gate) * mixed


class Other(Gated):
    """A block of another class in the same list."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return self.mix(hidden).sin() + scale * hidden


class Pair(Gated):
    """A block that returns another tensor besides."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return super().forward(hidden, scale), hidden.mean()


class Number(Gated):
    """A block that returns a number besides."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return super().forward(hidden, scale), 3


class Half(Gated):
    """A block that returns other hidden states than it is given."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return super().forward(hidden, scale)[..., : HIDDEN // 2]


class Model(PreTrainedModel):
    """A model whose loop gives every block a trained tensor."""

    config_class = PreTrainedConfig

    def __init__(self, *kinds: type[nn.Module], reads: bool = False) -> None:
        super().__init__(PreTrainedConfig())
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.layers = nn.ModuleList(kind() for kind in kinds)
        self.reads = reads

    def forward(self, x: Tensor) -> tuple[Tensor]:
        others: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, self.scale)
            if isinstance(x, tuple):
                x, other = x
                others.append(other)
        return (x + sum(others) if self.reads else x,)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


def assert_exact(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Gradients of all parameters are the twin's, and the plain model's at 16 bits."""
    plain = copy.deepcopy(model)
    near = meft.make_reversible(copy.deepcopy(model), NEAR)
    model = meft.make_reversible(model, WITHOUT).train()
    rebuilt = gradients(model, inputs)
    assert len(rebuilt) > len(list(plain.parameters())) - 2  # and the loss
    assert_same_bits(rebuilt, gradients(twin_of(model), inputs))
    expected = gradients(plain.eval(), inputs)
    found = gradients(near.eval(), inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kinds", [(Gated,) * 3, (Gated, Other, Gated), (Pair,) * 3, (Gated,)], ids=str
)
def test_any_blocks_train_exactly(kinds: tuple[type[nn.Module], ...]) -> None:
    """Whatever they compute, of one class or several, and with arguments that want
    gradients."""
    assert_exact(Model(*kinds), batch())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_swin_trains_exactly(attention: str) -> None:
    """Windows that are shifted in turn, stages of several widths, and dropped paths."""
    kind: Any = SwinConfig
    config = kind(
        embed_dim=8,
        depths=[2, 3],
        num_heads=[1, 2],
        image_size=16,
        patch_size=2,
        window_size=2,
        drop_path_rate=0.3,
        num_labels=LABELS,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(config)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    assert_exact(model, {"pixel_values": images, "labels": torch.tensor([0, 1, 1])})
    assert len(find_stacks(model)) == 2


def mamba() -> PreTrainedModel:
    """A language model without attention."""
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=3, state_size=4
    )
    torch.manual_seed(0)
    return MambaForCausalLM(config)


def test_mamba_trains_exactly() -> None:
    """With the cache of states that it makes by default."""
    ids = text()["input_ids"]
    assert_exact(mamba(), {"input_ids": ids, "labels": ids})


def test_mamba_generates() -> None:
    """With its cache as without."""
    model = meft.make_reversible(mamba(), WITHOUT).eval()
    prompt = {"input_ids": text()["input_ids"][1:, :5], "max_new_tokens": 6}
    cached = model.generate(**prompt, do_sample=False)
    assert torch.equal(
        cached, model.generate(**prompt, do_sample=False, use_cache=False)
    )


@pytest.mark.parametrize(
    "config",
    [
        meft.ReversibleConfig(variant="meft1"),
        meft.ReversibleConfig(adapter=None, mlp_chunks=2),
    ],
    ids=["adapters", "chunks"],
)
def test_what_needs_halves_is_refused(config: meft.ReversibleConfig) -> None:
    """At the conversion, with what to pass instead."""
    with pytest.raises(meft.UnsupportedModelError, match=r"`ReversibleConfig\(adapter"):
        meft.make_reversible(Model(Gated, Gated), config)


def test_a_list_of_registered_blocks() -> None:
    """Blocks that transformers cannot checkpoint, by one line."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
            mixed: Tensor = self.mix(hidden.cumsum(1)).tanh() * scale
            return mixed

    with pytest.raises(meft.UnsupportedModelError, match="register_family"):
        meft.make_reversible(Model(Plain, Plain), WITHOUT)
    before = dict(unlisted._REGISTERED)
    try:
        meft.register_family(Plain)
        assert_exact(Model(Plain, Plain), batch())
        with pytest.raises(meft.UnsupportedModelError, match="only be called as they"):
            meft.make_reversible(
                Model(Plain, Plain), meft.ReversibleConfig(variant="meft1")
            )
        with pytest.raises(meft.UnsupportedModelError, match="not supported by sparse"):
            meft.add_sparse_adapters(
                Model(Plain, Plain), meft.SparseConfig(num_neurons=8, top_k_neurons=2)
            )
    finally:
        unlisted._REGISTERED.clear()
        unlisted._REGISTERED.update(before)


def test_one_half_alone_is_no_description() -> None:
    """Both, or none."""
    with pytest.raises(meft.ConfigError, match="must both be given"):
        meft.register_family(Gated, attention=meft.Half("a", "b"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(Pair, Pair, reads=True), "output 1 of a block"),
        (Model(Number, Number), "returns a int besides hidden states"),
        (Model(Half, Half), "need.* blocks that change"),
        (Model(Gated, Pair), "as many values as the first block"),
    ],
    ids=["read", "number", "shape", "several"],
)
def test_what_a_block_returns_besides(model: Model, message: str) -> None:
    """Is refused where something depends on it."""
    meft.make_reversible(model, WITHOUT)
    with pytest.raises(meft.MeftError, match=message):
        model(**batch())
