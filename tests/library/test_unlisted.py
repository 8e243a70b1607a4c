"""Blocks of classes that no family lists: guessed by their names, or registered."""

import copy
import functools
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import meft
from library.families import (
    HIDDEN,
    assert_same_bits,
    continued_text,
    gradients,
    objective,
    t5_config,
    twin_of,
)
from meft import Half
from meft.backbone import unlisted

DEPTH = 3
CONFIG = meft.ReversibleConfig(variant="meft1", bottleneck_size=3)


class Attention(nn.Module):
    """Stands for attention: mixes the tokens of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return self.linear(hidden_states.cumsum(1)).tanh() * scale, None


class Norm(nn.Module):
    """A norm of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return hidden_states * torch.rsqrt(variance + 1e-6) * self.weight


class AsLlama(nn.Module):
    """The structure and the names of LLaMA's block."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU())

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **call)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NormsExchanged(AsLlama):
    """The names of LLaMA's block, and another structure."""

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        attended, _ = self.self_attn(
            self.post_attention_layernorm(hidden_states), **call
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


class DropsAtTheEnd(AsLlama):
    """A structure that only training shows to be another."""

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        out = super().forward(hidden_states, **call)
        return nn.functional.dropout(out, 0.5, self.training)


class OtherNames(nn.Module):
    """A block under names of its own, which returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = Norm(), Norm()
        self.mixer, self.feed = Attention(), nn.Linear(HIDDEN, HIDDEN)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        x = x + self.drop(self.mixer(self.norm_a(x), scale=scale)[0])
        return x + self.feed(self.norm_b(x)), None


class BothAtOnce(OtherNames):
    """A parallel block under names of its own."""

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        attended = self.drop(self.mixer(self.norm_a(x), scale=scale)[0])
        return x + attended + self.feed(self.norm_b(x)), None


HALVES: dict[str, Any] = {
    "attention": Half("norm_a", "mixer drop"),
    "mlp": Half("norm_b", "feed"),
    "returns": 2,
}


class Model(PreTrainedModel):
    """A model of one's own with a list of such blocks."""

    config_class = PreTrainedConfig

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__(PreTrainedConfig())
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for index, block in enumerate(self.blocks):
            x = block(x, scale=1 + index / 8)
            x = x[0] if isinstance(x, tuple) else x
        return (x,)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Registrations of one test are not those of the next."""
    before = dict(unlisted._REGISTERED)
    yield
    unlisted._REGISTERED.clear()
    unlisted._REGISTERED.update(before)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))}


def assert_right(block: type[nn.Module], **config: Any) -> Model:
    """Rebuilt gradients are those of the twin, and with 16 lost bits and no adapters
    the model is the plain one."""
    options = {"variant": "meft1", "bottleneck_size": 3, "lost_bits": 6, **config}
    config_ = meft.ReversibleConfig(**options)
    model = Model(block)
    meft.make_reversible(model, config_)
    model.train()
    twin = twin_of(copy.deepcopy(model))
    rebuilt, stored = gradients(model, batch()), gradients(twin, batch())
    assert rebuilt.keys() == stored.keys()
    assert all(torch.equal(rebuilt[name], stored[name]) for name in rebuilt)
    exact = meft.ReversibleConfig(adapter=None, lost_bits=16)
    same = meft.make_reversible(Model(block), exact)
    plain = _evaluated(Model(block))
    torch.testing.assert_close(_evaluated(same), plain, rtol=1e-4, atol=1e-4)
    return model


def test_a_block_with_known_names_is_taken() -> None:
    """Without a word of its class; each block gets its own arguments."""
    model = assert_right(AsLlama)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(objective(again.train(False)(**batch())), _evaluated(model))


def _evaluated(model: Model) -> Tensor:
    return objective(model.train(False)(**batch()))


@pytest.mark.parametrize("convert", ["reversible", "sparse"])
def test_known_names_in_another_structure_are_refused(convert: str) -> None:
    """By the first forward, before it returns anything."""
    model = Model(NormsExchanged)
    if convert == "reversible":
        meft.make_reversible(model, CONFIG)
    else:
        meft.add_sparse_adapters(
            model, meft.SparseConfig(num_neurons=32, top_k_neurons=4, num_experts=0)
        )
    with pytest.raises(
        meft.UnsupportedModelError, match=r"block.*, a NormsExchanged, does not compute"
    ):
        model(**batch())


def test_each_mode_is_compared() -> None:
    """A dropout that the layout lacks is seen in training alone."""
    model = meft.make_reversible(Model(DropsAtTheEnd), CONFIG).train(False)
    model(**batch())
    with pytest.raises(meft.UnsupportedModelError, match="does not compute what"):
        model.train()(**batch())


def test_other_names_are_refused_and_what_is_missing_is_named() -> None:
    """Until the class is registered."""
    with pytest.raises(meft.UnsupportedModelError, match=r"lacks .*register_family"):
        meft.make_reversible(Model(OtherNames), CONFIG)


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_registered_class_is_taken(variant: str, chunks: int) -> None:
    """In all variants, in chunks, and copied and pickled."""
    meft.register_family(OtherNames, **HALVES)
    model = assert_right(OtherNames, variant=variant, mlp_chunks=chunks)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(objective(again.train(False)(**batch())), _evaluated(model))


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_registered_parallel_class_is_taken(variant: str, chunks: int) -> None:
    """Its halves are added."""
    meft.register_family(BothAtOnce, is_parallel=True, **HALVES)
    assert_right(BothAtOnce, variant=variant, mlp_chunks=chunks)


@pytest.mark.parametrize(
    "changed",
    [
        {"mlp": Half("norm_a", "feed")},
        {"attention": Half("norm_a", "mixer")},
        {"attention": Half("", "mixer drop")},
        {"mlp": Half("", "feed", "norm_b")},
        {"is_parallel": True},
    ],
)
def test_a_wrong_description_is_refused(changed: dict[str, Any]) -> None:
    """Another norm, a dropout left out, no norm, one after, both halves at once."""
    meft.register_family(OtherNames, **(HALVES | changed))
    model = meft.make_reversible(Model(OtherNames).train(), CONFIG)
    with pytest.raises(meft.UnsupportedModelError, match="does not compute what"):
        model(**batch())


def test_a_later_description_replaces_an_earlier_one() -> None:
    """Of the same class."""
    meft.register_family(OtherNames, **HALVES, is_parallel=True)
    meft.register_family(OtherNames, **HALVES)
    assert_right(OtherNames)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": OtherNames()}, "class derived from"),
        ({"block": int}, "class derived from"),
        ({"attention": Half("norm_a")}, "`attention` must be a `meft.Half`"),
        ({"mlp": "feed"}, "`mlp` must be a `meft.Half`"),
    ],
)
def test_what_is_no_description(given: dict[str, Any], message: str) -> None:
    """Is refused when it is registered."""
    call = {"block": OtherNames, **HALVES} | given
    register: Any = inspect.unwrap(meft.register_family)  # not the type checker's
    with pytest.raises(meft.ConfigError, match=message):
        register(call.pop("block"), **call)


class WithoutWeight(AsLlama):
    """Norms without a weight, as those of OLMo."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, nn.LayerNorm(HIDDEN, elementwise_affine=False))


def test_norms_without_a_weight() -> None:
    """The width is that of the config; without one, the model stays as it is."""
    model = Model(WithoutWeight)
    with pytest.raises(meft.UnsupportedModelError, match="no `hidden_size`"):
        meft.make_reversible(model, CONFIG)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.config.hidden_size = HIDDEN
    meft.make_reversible(model, CONFIG)
    model(**batch())


def test_names_that_a_block_lacks_are_refused_at_the_conversion() -> None:
    """With the names."""
    meft.register_family(OtherNames, **(HALVES | {"mlp": Half("norm_c", "feed")}))
    with pytest.raises(meft.UnsupportedModelError, match="no `norm_c`"):
        meft.make_reversible(Model(OtherNames), CONFIG)


class Gated(AsLlama):
    """A parameter of its own that has no effect before it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        return super().forward(hidden_states, **call) * self.gate


class Extra(AsLlama):
    """A linear layer inside the feed-forward's norm that adds 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm.extra = nn.Linear(HIDDEN, HIDDEN)
        nn.init.zeros_(self.input_layernorm.extra.weight)
        nn.init.zeros_(self.input_layernorm.extra.bias)

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        extra: Any = self.input_layernorm.extra
        return super().forward(hidden_states, **call) + extra(hidden_states)


class SameNorms(NormsExchanged):
    """Norms that are exchanged, and equal before training."""

    def __init__(self) -> None:
        super().__init__()
        self.post_attention_layernorm.load_state_dict(self.input_layernorm.state_dict())


class ByIndex(AsLlama):
    """Blocks that differ by an attribute that is a number of their own."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = ByIndex.count % DEPTH
        ByIndex.count += 1

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        return super().forward(hidden_states, **call) * (1 + self.layer_idx)


class ByLength(AsLlama):
    """A function that changes with the number of tokens."""

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        out = super().forward(hidden_states, **call)
        return 2 * out if hidden_states.shape[1] > 6 else out


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (Gated, "`gate`"),
        (Extra, r"gradient of input_layernorm\.extra"),
        (SameNorms, r"gradient of input_layernorm\.weight"),
        (ByIndex, "block 1, a ByIndex"),
    ],
)
def test_what_the_first_values_do_not_show_is_refused(
    block: type[nn.Module], says: str
) -> None:
    """A parameter that is left out, exchanged norms, and a block that is not like the
    first; whether the class is guessed or registered."""
    halves = (
        Half("input_layernorm", "self_attn"),
        Half("post_attention_layernorm", "mlp"),
    )
    for is_registered in (False, True):
        if is_registered and block is not Gated:
            meft.register_family(block, attention=halves[0], mlp=halves[1])
            ByIndex.count = 0
        with pytest.raises(meft.UnsupportedModelError, match=says):
            meft.make_reversible(Model(block), CONFIG)(**batch())


def test_another_length_is_compared_again() -> None:
    """Of a class that is not listed."""
    model = meft.make_reversible(Model(ByLength), CONFIG)
    model(**batch())
    with pytest.raises(meft.UnsupportedModelError, match="does not compute"):
        model(x=torch.randn(2, 9, HIDDEN))


class Pairs(AsLlama):
    """A block with known names that returns a pair."""

    def forward(self, hidden_states: Tensor, **call: Any) -> Any:
        return super().forward(hidden_states, **call), None


def test_a_guess_returns_what_the_block_does() -> None:
    """A tuple, also of a model of one block, whose loop takes its first item."""
    assert_right(Pairs)
    model = Model(Pairs)
    model.blocks = model.blocks[:1]
    expected = _evaluated(model)
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None, lost_bits=16))
    assert model(**batch())[0].shape == batch()["x"].shape
    torch.testing.assert_close(_evaluated(model), expected, rtol=1e-4, atol=1e-4)


def test_a_wrong_number_of_values_is_refused() -> None:
    """With the number that the block returns."""
    meft.register_family(OtherNames, **(HALVES | {"returns": 3}))
    model = meft.make_reversible(Model(OtherNames), CONFIG)
    with pytest.raises(meft.UnsupportedModelError, match="returns a tuple of 2"):
        model(**batch())


def test_arguments_keep_their_graphs() -> None:
    """The bias that the first block of an mT5 computes, and all blocks are given, has
    its gradient also where the comparison has run a backward."""
    kind = functools.partial(transformers.MT5Config, tie_word_embeddings=False)
    config = t5_config(DEPTH, kind=kind)
    torch.manual_seed(0)
    model: Any = transformers.MT5ForConditionalGeneration(config)  # type: ignore[arg-type]  # it is an MT5Config
    model.train()
    meft.make_reversible(model, meft.ReversibleConfig(adapter=None))
    rebuilt = gradients(model, continued_text())
    assert any("relative_attention_bias" in name for name in rebuilt)
    assert_same_bits(rebuilt, gradients(twin_of(model), continued_text()))
