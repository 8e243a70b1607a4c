"""What every family refuses, by name."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

import meft
from library.families import (
    CASES,
    Case,
    assert_same_bits,
    cases,
    gradients,
    reversible,
    text,
)
from meft.backbone.families import FAMILIES
from meft.reversible.blocks import find_stacks

every_kind = cases("Model", "BartForCausalLM")
one_head_each = cases("ForSequenceClassification", "ForImageClassification")


@one_head_each
def test_a_refused_load_leaves_the_plain_model(case: Case, tmp_path: Path) -> None:
    """Where a tensor does not fit, every stack of the model has its blocks back, and
    what was trainable is."""
    meft.save_adapters(reversible(case), tmp_path)
    path = tmp_path / "adapters.safetensors"
    trained = load_file(path)
    name = max(name for name in trained if ".adapters." in name)
    save_file(trained | {name: torch.zeros(1)}, path)
    model = case.build()
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(meft.AdapterFileError, match="with shape"):
        meft.load_adapters(model, tmp_path)
    assert not find_stacks(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_same_bits(
        gradients(model.requires_grad_(True), case.batch()),
        gradients(case.build(), case.batch()),
    )
    model(**case.batch(), output_hidden_states=True)


@every_kind
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_single_blocks_are_refused(case: Case, name: str) -> None:
    """Requested in the call or in the config."""
    torch.manual_seed(1)
    config = meft.ReversibleConfig(variant="meft1")
    model = meft.make_reversible(case.build(1, attn_implementation="eager"), config)
    with pytest.raises(meft.UnsupportedCallError, match=f"`{name}=True`"):
        model(**case.batch(), **{name: True})
    setattr(model.config, name, True)
    with pytest.raises(meft.UnsupportedCallError, match=f"`{name}=True`"):
        model(**case.batch())


@every_kind
def test_gradient_checkpointing_is_refused(case: Case) -> None:
    """When converting, and when it is switched on later; not in evaluation, where it
    does nothing. What the message says helps."""
    config = meft.ReversibleConfig(variant="meft1")
    advice = "activation_checkpointing_disable"
    plain = case.build(1)
    if not plain.supports_gradient_checkpointing:
        pytest.skip("transformers has none")
    plain.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedModelError, match=advice):
        meft.make_reversible(plain, config)
    assert not find_stacks(plain)
    model = reversible(case, 1)
    model.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedCallError, match=advice):
        model(**case.batch())
    model.eval()(**case.batch())
    model.train().activation_checkpointing_disable()
    model(**case.batch())


@cases("OPTModel", "BartModel")
@pytest.mark.parametrize("side", ["", "encoder_", "decoder_"])
def test_layerdrop_is_refused(case: Case, side: str) -> None:
    """A loop that leaves out blocks at random cannot run them as one stack."""
    if bool(side) != (case.family in ("BART", "MBart")):
        pytest.skip("no such option")
    model = case.build(1, **{f"{side}layerdrop": 0.1})
    with pytest.raises(meft.UnsupportedModelError, match="`layerdrop` above 0"):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    assert not find_stacks(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("is_copied", [False, True])
@cases("OPTForCausalLM", "BartModel")
def test_layerdrop_that_is_set_later_is_refused(case: Case, is_copied: bool) -> None:
    """Before anything is left out, in training: evaluation leaves out nothing."""
    model = reversible(case)
    if is_copied:
        model = copy.deepcopy(model)
    decoder: Any = model.get_decoder()
    decoder.layerdrop = 1.0
    for _ in range(2):
        with pytest.raises(meft.UnsupportedCallError, match="was set to 1"):
            model(**case.batch())
    model.eval()(**case.batch())
    decoder.layerdrop = 0.0
    model.train()(**case.batch())


@cases("BertModel", "RobertaModel")
def test_a_decoder_bert_is_refused(case: Case) -> None:
    """Its blocks hold a cache and cross-attention, which the halves leave out."""
    if case.family in ("DistilBERT", "ModernBERT"):
        pytest.skip("has no decoder")
    model = case.build(1, is_decoder=True)
    with pytest.raises(
        meft.UnsupportedModelError, match=f"a {case.family}, but it has"
    ):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    assert not find_stacks(model)


def case_of(kind: str) -> Case:
    return next(case for case in CASES if case.kind == kind)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("GPT2Model", {"add_cross_attention": True}, "add_cross_attention=False"),
        ("FalconModel", {"hidden_dropout": 0.1}, "set `hidden_dropout=0.0`"),
        (
            "BloomModel",
            {"apply_residual_connection_post_layernorm": True},
            "set it to False",
        ),
        ("MixtralModel", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.0"),
    ],
)
def test_forms_of_blocks_that_are_no_two_halves(
    kind: str, options: dict[str, Any], message: str
) -> None:
    """Are refused, with the field of the config that chose them."""
    model = case_of(kind).build(1, **options)
    with pytest.raises(meft.UnsupportedModelError, match=message):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    assert not find_stacks(model)


def test_chunks_of_blocks_that_drop_whole_rows_are_refused() -> None:
    """A chunk has tokens of several rows; without chunks rows are dropped as before."""
    case = case_of("Dinov2Model")
    config = meft.ReversibleConfig(variant="meft1", mlp_chunks=2)
    model = case.build()
    with pytest.raises(meft.ConfigError, match=r"Dinov2DropPath.*drop_path_rate=0"):
        meft.make_reversible(model, config)
    assert not find_stacks(model)
    meft.make_reversible(case.build(drop_path_rate=0.0), config)


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("train", [True, False])
def test_outputs_of_routers_are_refused(kind: str, train: bool) -> None:
    """Hooks that collect them would see them more than once, without a graph."""
    case = case_of(kind)
    model = reversible(case).train(train)
    with pytest.raises(meft.UnsupportedCallError, match="`output_router_logits=True`"):
        model(**case.batch(), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(meft.UnsupportedCallError, match="`output_router_logits=True`"):
        model(**case.batch())
    model(**case.batch(), output_router_logits=False)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "MPNetForMaskedLM"])
def test_a_copy_refuses_outputs_of_single_blocks(kind: str) -> None:
    """Copied and pickled; models that take the request out of the call, or collect
    hidden states in their loop."""
    case = case_of(kind)
    model = reversible(case)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(meft.UnsupportedCallError, match="`output_hidden_states="):
            copied(**case.batch(), output_hidden_states=True)
        body: Any = copied.base_model
        with pytest.raises(meft.UnsupportedCallError, match="`output_hidden_states="):
            body(**text(), output_hidden_states=True)


def test_an_unknown_model_is_named() -> None:
    """The message says what was given, which listed family is nearest and what the
    blocks lack of it, what is supported, and how blocks are described."""
    config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
    model = MambaForCausalLM(config)
    supported = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    nearest = r"a MambaBlock is most like a block of \w+, but lacks `.*` and also has"
    message = f"MambaForCausalLM is not supported.*{nearest}.*{supported}, with any"
    with pytest.raises(meft.UnsupportedModelError, match=message):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    assert all(parameter.requires_grad for parameter in model.parameters())
