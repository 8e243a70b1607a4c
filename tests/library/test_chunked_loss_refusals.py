"""Models, heads, calls and arguments with which a loss in chunks would be
another loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

import meft
from library.families import CASES
from library.losses import HIDDEN, VOCAB, llama, loss_and_gradients, rows
from library.models import bert_config


class Own(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Renamed(LlamaForCausalLM):
    """A subclass with the forward of its base is as good."""


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    )


@pytest.mark.parametrize(
    "model",
    [BertForMaskedLM(bert_config()), bart(), Own(llama().config)],
    ids=lambda model: type(model).__name__,
)
def test_other_classes_are_refused(model: PreTrainedModel) -> None:
    """By a message that says which are not."""
    names = "OPTForCausalLM, .*LlamaForCausalLM, MistralForCausalLM"
    with pytest.raises(meft.UnsupportedModelError, match=names):
        meft.chunk_loss(model)
    assert meft.chunk_loss(Renamed(llama().config))(**rows()).logits is None


def _with_more(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


def _with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def _with_backward_hook(model: Any) -> None:
    model.lm_head.register_full_backward_hook(lambda *_: None)


def _with_loss(model: Any) -> None:
    model.loss_function = lambda **_: torch.zeros(())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_with_more, "not a plain `nn.Linear`"),
        (_with_hook, "on its `lm_head` a forward hook"),
        (_with_backward_hook, "on its `lm_head` a backward hook"),
        (_with_loss, "not `ForCausalLMLoss`"),
    ],
)
def test_what_would_be_bypassed_is_refused(
    change: Callable[[Any], None], says: str
) -> None:
    """A head that is more than a matrix, hooks on it, a loss of one's own: before, and
    at the call if it came later."""
    model = llama()
    change(model)
    with pytest.raises(meft.UnsupportedModelError, match=says):
        meft.chunk_loss(model)
    model = meft.chunk_loss(llama())
    change(model)
    with pytest.raises(meft.UnsupportedCallError, match=says):
        model(**rows())


def test_a_head_with_a_bias_is_a_plain_one() -> None:
    """No class of the three makes one, but nothing forbids it."""
    model = llama()
    model.lm_head = nn.Linear(HIDDEN, VOCAB)
    expected = loss_and_gradients(model, **rows())
    got = loss_and_gradients(meft.chunk_loss(model), **rows())
    assert "lm_head.bias" in got
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_replaced_forward_is_refused() -> None:
    """Ours, and anybody's."""
    model = meft.chunk_loss(llama())
    with pytest.raises(meft.UnsupportedModelError, match="chunked already"):
        meft.chunk_loss(model)
    model = llama()
    model.forward = model.forward
    with pytest.raises(meft.UnsupportedModelError, match="before that"):
        meft.chunk_loss(model)


def test_calls_that_want_logits_or_another_loss_are_refused() -> None:
    """Nothing is silently left out."""
    model = meft.chunk_loss(llama())
    with pytest.raises(meft.UnsupportedCallError, match="keeps no logits"):
        model(**rows(), logits_to_keep=2)
    with pytest.raises(meft.UnsupportedCallError, match="label_smoothing"):
        model(**rows(), label_smoothing=0.1)
    inputs = rows()
    inputs["labels"] = inputs["labels"][:, :5]
    with pytest.raises(ValueError, match=r"each of the \(3, 7\) tokens, .*\(3, 5\)"):
        model(**inputs)


@pytest.mark.parametrize("is_later", [False, True])
def test_capped_logits_are_refused(is_later: bool) -> None:
    """When the loss is chunked, and when they are capped since."""
    (case,) = (case for case in CASES if case.kind == "Gemma3ForCausalLM")
    model: Any = case.build()
    call = (
        partial(model, **case.batch()) if is_later else partial(meft.chunk_loss, model)
    )
    if is_later:
        meft.chunk_loss(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(meft.MeftError, match="`final_logit_softcapping=30"):
        call()


def test_illegal_arguments_are_refused() -> None:
    """Before the model is touched."""
    model = llama()
    with pytest.raises(meft.ConfigError, match="at least 1, got 0"):
        meft.chunk_loss(model, chunk_tokens=0)
    with pytest.raises(meft.ConfigError, match="'torch' or 'liger', got 'triton'"):
        meft.chunk_loss(model, backend="triton")
    assert "forward" not in vars(model)
