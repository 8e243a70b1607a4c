"""Time of the library's hot paths, each next to its alternative.

Run by `tox -e micro`; the groups compare within one run, which is the only comparison
worth making on a shared machine.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from transformers import BertConfig, BertModel

import meft
from meft.bottleneck import Bottleneck
from meft.reversible.coupling import Arithmetic, Branch, Coupling
from meft.reversible.fixed import Fixed
from meft.reversible.floating import Floating
from meft.reversible.integer_format import FRACTION_BITS_WIDE

ROWS, SEQ, HIDDEN, DEPTH = 8, 128, 256, 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def hidden(requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(ROWS, SEQ, HIDDEN, requires_grad=requires_grad)


@pytest.mark.benchmark(group="coupling")
@pytest.mark.parametrize("arithmetic", ["float", "fixed"])
@pytest.mark.parametrize("way", ["couple", "uncouple"])
def test_step(benchmark: BenchmarkFixture, arithmetic: str, way: str) -> None:
    """A coupling's own arithmetic, with a branch that costs nothing."""
    dtype = torch.float32
    streams: Arithmetic = (
        Floating(compute_dtype=dtype, stream_dtype=dtype)
        if arithmetic == "float"
        else Fixed(compute_dtype=dtype, fraction_bits=FRACTION_BITS_WIDE)
    )
    coupling = Coupling(
        target=0, branch=Branch(), scale=1 / 16, difference=True, block=0, number=0
    )
    target, source = streams.enter(hidden()), streams.enter(hidden())
    value = hidden()
    kept = streams.couple_(target, source, value, coupling)

    def run() -> None:
        if way == "couple":
            streams.couple_(target, source, value, coupling)
        else:
            streams.uncouple_(target, source, value, coupling, kept)

    benchmark.pedantic(run, rounds=50, warmup_rounds=10)


@pytest.mark.benchmark(group="adapter")
@pytest.mark.parametrize("part", ["forward", "forward and backward"])
def test_adapter(benchmark: BenchmarkFixture, part: str) -> None:
    """One bottleneck adapter of inner width 64."""
    adapter = Bottleneck(HIDDEN, 64, torch.nn.functional.gelu, dropout=0.1)
    x = hidden(requires_grad=True)

    def run() -> None:
        out = adapter(x)
        if part != "forward":
            out.sum().backward()

    benchmark(run)


def encoder_of(way: str) -> BertModel:
    """A BERT of 6 blocks, fine-tuned `way`."""
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        vocab_size=100,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.train()
    if way.startswith("meft"):
        variant, arithmetic, backward = way.split()
        chosen = meft.ReversibleConfig(
            variant=variant, arithmetic=arithmetic, backward=backward
        )
        meft.make_reversible(model, chosen)
    elif way == "checkpointing":
        # The backbone is frozen, as it is for the reversible variants.
        model.requires_grad_(False)
        model.activation_checkpointing_enable()
    return model


WAYS = [
    "full",
    "checkpointing",
    "meft1 float rebuild",
    "meft1 fixed rebuild",
    "meft1 fixed store",
    "meft2 fixed rebuild",
    "meft3 fixed rebuild",
]


@pytest.mark.benchmark(group="stack, forward")
@pytest.mark.parametrize("way", WAYS)
def test_stack_forward(benchmark: BenchmarkFixture, way: str) -> None:
    """Forward of six blocks in training mode."""
    encoder: nn.Module = encoder_of(way).encoder
    x = hidden()
    benchmark.pedantic(lambda: encoder(x), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="stack, forward and backward")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::meft.LostGradientWarning")
def test_stack_backward(benchmark: BenchmarkFixture, way: str) -> None:
    """One whole training pass of six blocks: rebuilding and checkpointing both pay one
    more forward; rebuilding trains two adapters a block on top."""
    encoder: nn.Module = encoder_of(way).encoder
    x = hidden(requires_grad=True)

    def run() -> None:
        encoder(x).last_hidden_state.sum().backward()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
