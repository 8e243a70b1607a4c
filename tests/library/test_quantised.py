"""Backbones whose frozen weights are quantised, by torchao and by bitsandbytes.

They run where the libraries are installed, which other tests do not need: `tox -e full`
installs them into a folder of their own; or `pip install torchao bitsandbytes`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import meft
from library.families import CASES, Case, assert_same_bits, gradients, twin_of

LLAMA = next(case for case in CASES if case.kind == "LlamaForCausalLM")
BERT = next(case for case in CASES if case.kind == "BertForSequenceClassification")


def int8(model: Any) -> Any:
    """Weights of 8 bits, by torchao."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="no torchao")
    model = nn.Module.to(model, torch.bfloat16)
    torchao.quantize_(model.base_model, torchao.Int8WeightOnlyConfig())
    return model


def int4(model: Any) -> Any:
    """Weights of 4 bits, by torchao, of which each takes a byte."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="no torchao")
    granularity: Any = pytest.importorskip("torchao.quantization.granularity")
    model = nn.Module.to(model, torch.bfloat16)
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=vars(torch)["int4"],  # torch's stubs lack it
        granularity=granularity.PerAxis(0),
    )
    torchao.quantize_(model.base_model, config)
    return model


def nf4(model: Any) -> Any:
    """Weights of 4 bits, by bitsandbytes."""
    bnb: Any = pytest.importorskip("bitsandbytes", reason="no bitsandbytes")

    def quantise(module: nn.Module) -> None:
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear):
                quantise(child)
                continue
            linear = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            linear.load_state_dict(child.state_dict())
            setattr(module, name, linear.to("cpu"))

    quantise(model.base_model)
    return model


@pytest.mark.filterwarnings("ignore")  # what the libraries say when they are imported
@pytest.mark.parametrize("case", [LLAMA, BERT], ids=lambda case: case.kind)
@pytest.mark.parametrize("quantised", [int8, int4, nf4])
@pytest.mark.parametrize("config", ["meft1", "meft3", "lora"])
def test_gradients_are_the_twins(
    case: Case, quantised: Callable[[Any], Any], config: str
) -> None:
    """Of adapters, and of LoRA inside, in every bit; none is missing."""
    model = quantised(case.build())
    options: dict[str, Any] = {"variant": config, "bottleneck_size": 3}
    if config == "lora":
        model.requires_grad_(False)
        names = ["q_proj", "v_proj"] if case is LLAMA else ["query", "value"]
        lora = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        model = get_peft_model(model, lora)
        options = {"adapter": None}
    torch.manual_seed(1)
    model = meft.make_reversible(model, meft.ReversibleConfig(**options)).train()
    found = gradients(model, case.batch())
    assert_same_bits(found, gradients(twin_of(model), case.batch()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained - {"loss"} <= found.keys()


class Int4Tensor(nn.Parameter):
    """A stub of torchao's type, which cannot be created without a GPU."""


Int4Tensor.__module__ = "torchao.quantization"


@pytest.mark.parametrize(
    ("add", "config"),
    [
        (meft.make_reversible, meft.ReversibleConfig(adapter=None)),
        (meft.add_sparse_adapters, meft.SparseConfig()),
    ],
)
def test_weights_without_a_derivative_are_refused(
    add: Callable[..., Any], config: Any
) -> None:
    """Before anything is changed, with what to take instead."""
    model = LLAMA.build()
    layer: Any = model.model.layers[1].mlp.up_proj
    layer.weight = Int4Tensor(layer.weight.detach(), requires_grad=False)
    before = [*model.state_dict()]
    with pytest.raises(
        meft.UnsupportedModelError,
        match=r"layers.1.mlp.up_proj.weight` is a Int4Tensor of torchao.*load_in_4bit",
    ):
        add(model, config)
    assert [*model.state_dict()] == before


def test_torchaos_types_of_4_bits_are_known() -> None:
    """By the names that torchao gives them."""
    torchao: Any = pytest.importorskip("torchao.quantization", reason="no torchao")
    kinds = [n for n in dir(torchao) if n.startswith("Int4") and n.endswith("Tensor")]
    assert "Int4Tensor" in kinds
    assert all(vars(torchao)[n].__module__.startswith("torchao.") for n in kinds)
