"""Blocks whose halves are unknown, which a model without our adapters calls itself."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
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
        (Model(Number, Number), "a value of type int besides"),
        (Model(Half, Half), "need.* blocks that change"),
        (Model(Gated, Pair), "what the first block has returned, no tuple"),
    ],
    ids=["read", "number", "shape", "several"],
)
def test_what_a_block_returns_besides(model: Model, message: str) -> None:
    """Is refused where something depends on it."""
    meft.make_reversible(model, WITHOUT)
    with pytest.raises(meft.MeftError, match=message):
        model(**batch())


class Marked(Gated):
    """A block of which a loop asks the class."""


class Asks(Model):
    """A loop that asks what its blocks are."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        layers = self.layers
        for i, layer in enumerate(layers):
            factor = 2.0 if isinstance(layer, Marked) else 1.0
            factor += layer == layers[1]
            factor += layers[i] in {layers[2]}
            x = layer.forward(x, self.scale * factor)
        return (x,)


def test_a_stand_in_is_its_block() -> None:
    """In `isinstance`, comparisons and sets; its `forward` is its call."""
    assert_exact(Asks(Gated, Marked, Gated, Gated), batch())


class Info(Gated):
    """A block that reads a dictionary."""

    def forward(self, hidden: Tensor, scale: Any) -> Any:
        return hidden + scale["scale"] * self.mix(hidden).tanh()


class Fills(Model):
    """A loop that reuses one dictionary, and changes it before each block."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        info: dict[str, Any] = {}
        for index, layer in enumerate(self.layers):
            info["scale"] = self.scale + index
            x = layer(x, info)
        return (x,)


def test_each_block_gets_a_container_as_it_was() -> None:
    """Though it runs later."""
    assert_exact(Fills(Info, Info, Info), batch())


class Counts(Model):
    """A loop that changes a tensor in place between blocks."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        place = torch.zeros(1)
        for layer in self.layers:
            x = layer(x, place)
            place += 1
        return (x,)


class InPlace(Gated):
    """A block that changes its input."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        update = self.mix(hidden).tanh() * scale
        return hidden.add_(update) if not hidden.requires_grad else hidden + update


class Remembers(Gated):
    """A block with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(HIDDEN)

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return hidden + scale * self.bn(hidden.flatten(0, 1)).view_as(hidden)


class Changes(Gated):
    """A block that adds to a tensor that it is given."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        with torch.no_grad():
            scale.add_(1)
        return hidden + scale * self.mix(hidden)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counts(Gated, Gated), "changed in place since"),
        (Model(InPlace, InPlace), "changes its input"),
        (Model(Remembers, Remembers), "changes its buffer `bn.running_mean`"),
        (Model(Changes, Changes), "changes its input or another argument"),
    ],
    ids=["loop", "input", "statistics", "argument"],
)
def test_what_changes_in_place_is_refused(model: Model, message: str) -> None:
    """Before anything has changed."""
    meft.make_reversible(model, WITHOUT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = batch()
    with pytest.raises(meft.MeftError, match=message), torch.no_grad():
        model.train()(**inputs)
    assert_same_bits(dict(model.state_dict()), before)
    assert torch.equal(inputs["x"], batch()["x"])


def test_statistics_that_stand_still_are_taken() -> None:
    """A batch norm in evaluation."""
    model: Any = Model(Remembers, Remembers)
    model.eval()
    expected = model(**batch())[0]
    meft.make_reversible(model, NEAR)
    torch.testing.assert_close(model(**batch())[0], expected, rtol=1e-3, atol=1e-3)


class TakesOutputs(Gated):
    """A block with an argument that models use for requests."""

    def forward(
        self, hidden: Tensor, scale: Tensor, output_attentions: bool = True
    ) -> Any:
        out = super().forward(hidden, scale)
        return (out * 2, hidden) if output_attentions else (out,)


class PassesOutputs(Model):
    """A loop that asks for no such outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = layer(x, self.scale, False)[0]
        return (x,)


def test_an_argument_that_asks_for_no_outputs_is_passed_on() -> None:
    """Though blocks in halves are not given it."""
    assert_exact(PassesOutputs(TakesOutputs, TakesOutputs), batch())


class OwnCache(Gated):
    """A block with an argument that is named as a cache and is none."""

    def forward(self, hidden: Tensor, scale: Tensor, cache: Any = 1.0) -> Any:
        return super().forward(hidden, scale * cache)


class PassesCache(Model):
    """A loop that gives each block a tensor under that name."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for index, layer in enumerate(self.layers):
            x = layer(x, scale=self.scale, cache=torch.tensor(1.0 + index))
        return (x,)


def test_only_a_cache_is_taken_for_one() -> None:
    """By its class, not by its name."""
    assert_exact(PassesCache(OwnCache, OwnCache), batch())


class ByName(Model):
    """A loop that gives hidden states by their name."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = layer(hidden=x, scale=self.scale)
        return (x,)


def test_hidden_states_may_be_given_by_name() -> None:
    """That of the first argument."""
    assert_exact(ByName(Gated, Gated), batch())


def test_a_loop_that_ends_early_is_refused() -> None:
    """Where its model returns what there is between two blocks."""
    options: dict[str, Any] = {"hidden_size": HIDDEN, "embedding_size": HIDDEN}
    options |= {"intermediate_size": 8}
    config = AlbertConfig(vocab_size=VOCAB, num_attention_heads=2, **options)
    model = AlbertModel(config, add_pooling_layer=False)
    meft.make_reversible(model, WITHOUT)
    config.num_hidden_layers -= 1
    with pytest.raises(meft.UnsupportedCallError, match="ended before the last block"):
        model(**text())
