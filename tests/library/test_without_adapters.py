"""`adapter=None`: models that train with LoRA and its kin, or as a whole."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn

import meft
from library.families import CASES, Batch, Case, cases, gradients, objective, twin_of
from meft.backbone.find import find_blocks
from meft.reversible.blocks import find_stacks

LLAMA = next(case for case in CASES if case.kind == "LlamaForCausalLM")
some = cases("LlamaForCausalLM", "BertForSequenceClassification", "BartForCausalLM")
every = cases("Model", "ForCausalLM", "ForImageClassification")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}


def _projections(case: Case) -> list[str]:
    found, *_ = find_blocks(case.build(1))
    return list(found.family.query_and_value)


def _peft_config(case: Case, kind: str) -> PeftConfig:
    if kind == "ia3":
        names = _projections(case)
        return IA3Config(target_modules=names, feedforward_modules=[])
    if kind == "ln":
        return LNTuningConfig(
            target_modules=["LayerNorm", "norm", "layernorm_embedding"]
        )
    return LoraConfig(
        r=3,
        target_modules=_projections(case),
        lora_dropout=0.1,
        init_lora_weights=False,
        **KINDS[kind],
    )


def _peft_model(case: Case, kind: str = "lora") -> PeftModel:
    model = case.build()
    torch.manual_seed(0)
    made = get_peft_model(model, _peft_config(case, kind))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def _reversible(model: Any, **config: Any) -> Any:
    return meft.make_reversible(
        model, meft.ReversibleConfig(adapter=None, **config)
    ).train()


def _assert_twins(model: Any, batch: Batch) -> Batch:
    """Gradients equal those of the twin in every bit, and none is missing."""
    twin = twin_of(copy.deepcopy(model))
    rebuilt, stored = gradients(model, batch), gradients(twin, batch)
    assert rebuilt.keys() == stored.keys()
    assert all(torch.equal(rebuilt[name], stored[name]) for name in rebuilt)
    return rebuilt


@some
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "ia3"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_peft_inside_trains_exactly(case: Case, kind: str, chunks: int) -> None:
    """Every parameter of peft gets the gradient of the twin, and nothing else does."""
    plain = _peft_model(case, kind)
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    model = _reversible(_peft_model(case, kind), mlp_chunks=chunks)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    found = _assert_twins(model, case.batch())
    # A decoder alone does not use what attends to an encoder.
    assert found.keys() == gradients(plain, case.batch()).keys()  # type: ignore[arg-type]


def test_norms_alone_train_exactly() -> None:
    """As by peft's LayerNorm tuning."""
    model = _reversible(LLAMA.build())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "norm" in name
    found = _assert_twins(model, LLAMA.batch())
    assert len(found) == 1 + 2 * 3 + 1


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_trains_exactly(case: Case, dtype: torch.dtype) -> None:
    """All parameters that train in the plain model, by the gradients of the twin."""
    plain: Any = nn.Module.to(case.build(), dtype)
    model = _reversible(nn.Module.to(case.build(), dtype))
    batch = {
        n: x.to(dtype) if x.is_floating_point() else x for n, x in case.batch().items()
    }
    found = _assert_twins(model, batch)
    assert found.keys() == gradients(plain, batch).keys()


@every
def test_with_16_lost_bits_it_is_the_plain_model(case: Case) -> None:
    """Outputs, and every gradient, but for the rounding of streams."""
    plain, model = case.build().eval(), _reversible(case.build(), lost_bits=16).eval()
    expected, found = gradients(plain, case.batch()), gradients(model, case.batch())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-5, name


@some
def test_more_lost_bits_start_nearer(case: Case) -> None:
    """Two bits more, at least three times nearer; the default is 8."""
    plain = case.build().eval()
    expected = plain(**case.batch()).logits
    errors = {}
    for k in (4, 6, 8, None):
        model = _reversible(case.build(), lost_bits=k).eval()
        errors[k] = (model(**case.batch()).logits - expected).norm().item()
    assert errors[4] > 3 * errors[6] > 9 * errors[8] == 9 * errors[None]


@some
def test_one_coupling_a_block_keeps_k_bits(case: Case) -> None:
    """And has no adapters, nor a parameter of its own."""
    model = _reversible(case.build())
    assert model.num_parameters() == case.build().num_parameters()
    for stack in find_stacks(model).values():
        assert stack.reversible.lost_bits == 8
        assert len(stack.adapters) == 0


@cases("LlamaForCausalLM")
def test_peft_saves_disables_and_merges(case: Case, tmp_path: Path) -> None:
    """Its own files hold all that trains; a plain model can load them."""
    model = _reversible(_peft_model(case), lost_bits=16).eval()
    batch = case.batch()
    with torch.no_grad():
        adapted = model(**batch).logits
        with model.disable_adapter():
            without = model(**batch).logits
        plain = case.build().eval()(**batch).logits
        torch.testing.assert_close(without, plain, rtol=0, atol=1e-3)
        assert not torch.allclose(adapted, plain, rtol=0, atol=1e-2)
        model.save_pretrained(tmp_path)  # without a warning: peft's files are whole
        loaded = PeftModel.from_pretrained(case.build(), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, adapted, rtol=0, atol=1e-3)
        again = meft.load_adapters(
            PeftModel.from_pretrained(case.build(), tmp_path), tmp_path
        )
        assert torch.equal(again.eval()(**batch).logits, adapted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, adapted, rtol=0, atol=1e-3)
        served = meft.remove_adapters(merged)
        torch.testing.assert_close(served(**batch).logits, adapted, rtol=0, atol=1e-3)
    assert type(served).__name__ == "LlamaForCausalLM"


@cases("LlamaForCausalLM")
def test_generation_with_a_cache_is_that_without(case: Case) -> None:
    model = _reversible(_peft_model(case)).eval()
    ids = case.batch()["input_ids"][1:]
    made = [
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=used)
        for used in (True, False)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": None, "variant": "meft1"}, "`variant` has no effect"),
        ({"adapter": None, "bottleneck_size": 4}, "`bottleneck_size` has no effect"),
        ({"adapter": None, "arithmetic": "float"}, r"for `arithmetic='fixed'`"),
        ({"adapter": "lora"}, "`adapter` must be"),
        ({}, r"`variant` is missing.*adapter=None"),
    ],
)
def test_what_a_config_refuses(fields: dict[str, Any], message: str) -> None:
    """Fields without effect, and a variant that is missing."""
    with pytest.raises(meft.ConfigError, match=message):
        meft.ReversibleConfig(**fields)


def test_a_model_in_which_nothing_trains_is_named() -> None:
    """Before the first step, in which there would be no gradient."""
    model = LLAMA.build().requires_grad_(False)
    with pytest.warns(meft.FrozenWarning, match="nothing would be trained"):
        _reversible(model)


@pytest.mark.parametrize("config", ["meft1", LoraConfig(), None])
def test_what_is_no_config(config: Any) -> None:
    """What a user of peft may pass; the model stays as it is."""
    model = LLAMA.build()
    make: Any = inspect.unwrap(meft.make_reversible)
    with pytest.raises(meft.ConfigError, match=r"must be a `meft.ReversibleConfig`"):
        make(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_config_survives_json() -> None:
    """With the number of lost bits that was chosen."""
    config = meft.ReversibleConfig(adapter=None)
    assert config.lost_bits == 8
    assert meft.ReversibleConfig.from_json(config.to_json()) == config
    old = meft.ReversibleConfig(variant="meft1").to_json()
    del old["adapter"]
    assert meft.ReversibleConfig.from_json(old).lost_bits == 4


def test_objectives_differ() -> None:
    """The rows of these tests are not all alike: a loss has a gradient."""
    assert objective(LLAMA.build()(**LLAMA.batch())).requires_grad
