"""`remove_adapters` and `disable_adapter` give back the plain model, bit by bit."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import meft
from library.families import Case, cases, gradients, objective
from meft.reversible.blocks import find_stacks
from meft.sparse.adapter import sparse_adapters

SPARSE = meft.SparseConfig(num_neurons=32, top_k_neurons=4, num_experts=0)
REVERSIBLE = meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
some = cases("BertModel", "BartModel", "LlamaForCausalLM", "ViTModel")


def reversible(model: Any) -> Any:
    return meft.make_reversible(model, REVERSIBLE)


def sparse(model: Any) -> Any:
    return meft.add_sparse_adapters(model, SPARSE)


def both(model: Any) -> Any:
    return reversible(sparse(model))


CONVERT: list[Callable[[Any], Any]] = [reversible, sparse, both]
converts = pytest.mark.parametrize("convert", CONVERT)


def _converted(case: Case, convert: Callable[[Any], Any]) -> Any:
    """A converted model whose adapters do something."""
    if convert is not reversible and case.family in ("BART", "MBart", "ViT"):
        pytest.skip("not supported by sparse adapters")
    model = convert(case.build())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@some
@converts
def test_removing_gives_the_plain_model(
    case: Case, convert: Callable[[Any], Any]
) -> None:
    """The same outputs and gradients, names, classes and numbers of hooks."""
    plain, model = case.build(), _converted(case, convert)
    with_adapters = objective(model.eval()(**case.batch()))
    assert meft.remove_adapters(model.train()) is model
    plain.requires_grad_(True)
    model.requires_grad_(True)
    expected, found = gradients(plain, case.batch()), gradients(model, case.batch())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert _hooks(plain) == _hooks(model)
    assert vars(model).keys() == vars(plain).keys()
    assert with_adapters != expected["loss"]


@some
@converts
def test_adapters_can_be_disabled_for_a_while(
    case: Case, convert: Callable[[Any], Any]
) -> None:
    """Also if the body raises; afterwards the model is the converted one again."""
    plain, model = case.build().eval(), _converted(case, convert).eval()
    before = objective(model(**case.batch()))
    with meft.disable_adapter(model):
        disabled = objective(model(**case.batch()))
    assert torch.equal(disabled, objective(plain(**case.batch())))
    with contextlib.suppress(ZeroDivisionError), meft.disable_adapter(model):
        _ = 1 / 0
    assert torch.equal(objective(model(**case.batch())), before)
    assert bool(find_stacks(model)) == (convert is not sparse)
    assert bool(sparse_adapters(model)) == (convert is not reversible)
    for stack in find_stacks(model).values():
        with pytest.raises(meft.UnsupportedCallError, match="called by itself"):
            stack[0](torch.zeros(1, 1, 16))


@cases("LlamaForCausalLM")
def test_peft_inside_stays(case: Case) -> None:
    """What peft has added remains and trains."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain: Any = get_peft_model(case.build(), lora)
    torch.manual_seed(0)
    model: Any = reversible(get_peft_model(case.build(), lora))
    meft.remove_adapters(model)
    expected, found = gradients(plain, case.batch()), gradients(model, case.batch())
    assert expected.keys() == found.keys() >= {"loss"}
    assert len(expected) > 1
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@cases("LlamaForCausalLM")
def test_a_model_can_be_converted_again(case: Case) -> None:
    """To other adapters, and saved."""
    model = meft.remove_adapters(_converted(case, both))
    again = meft.make_reversible(
        model, meft.ReversibleConfig(variant="meft3", bottleneck_size=3)
    )
    twin = copy.deepcopy(again)
    for stack in find_stacks(twin).values():
        stack.backward_pass = "store"
    expected, found = gradients(twin, case.batch()), gradients(again, case.batch())
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_plain_model_has_nothing_to_remove() -> None:
    """And is left as it is."""
    model = nn.Linear(2, 2)
    with pytest.raises(meft.UnsupportedModelError, match="has no adapters of meft"):
        meft.remove_adapters(model)
    with (
        pytest.raises(meft.UnsupportedModelError, match="has no adapters of meft"),
        meft.disable_adapter(model),
    ):
        pass


def test_trainable_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Shared ones once, in peft's words."""
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    model.append(nn.Linear(30, 10, bias=False).requires_grad_(False))
    meft.print_trainable_parameters(model)
    line = "trainable params: 100 || all params: 400 || trainable%: 25.0000\n"
    assert capsys.readouterr().out == line
