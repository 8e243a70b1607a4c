"""Trained vectors in front of the tokens, from the `peft` library.

    [p_1 ... p_n, e(x_1) ... e(x_m)]    n = `NUM_VIRTUAL_TOKENS`

prompt_tuning  the vectors p themselves (Lester et al., EMNLP 2021)
p_tuning       what an MLP makes of trained vectors (Liu et al., 2021)
prefix_tuning  keys and values in front of those of every attention (Li and Liang, ACL
               2021)

The backbone is frozen and a new head trains. What a task sees does not change: labels
and logits are those of its own tokens. Sizes of the MLP are those of the backbone. The
head of a classifier such as BERT's reads the first position, as peft has it: p_1, and
not the token that was meant for it.
"""

from functools import partial
from typing import Any

import torch
from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from meft_bench.child.backbones import heads_of, image_shape
from meft_bench.child.backbones.classifier import num_positions
from meft_bench.child.methods.lora import with_head
from meft_bench.child.tasks.batches import IGNORED
from meft_bench.shared.cell import Cell

NUM_VIRTUAL_TOKENS = 20
"""The number of vectors, or of keys and values of each attention."""


def _with_prompt(model: PreTrainedModel, cell: Cell, kind: Any) -> PreTrainedModel:
    _refuse(model, cell, kind)
    config = kind(
        task_type="SEQ_CLS" if heads_of(model) else "CAUSAL_LM",
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
    )
    prompted: Any = get_peft_model(model, config)
    for name, module in list(prompted.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # holds a second, frozen head
            prompted.set_submodule(name, module.original_module)
    if kind is PrefixTuningConfig:
        prompted.generate = _refuse_to_generate
    else:
        prompted.register_forward_pre_hook(_without_prompt, with_kwargs=True)
        prompted.generate = partial(_generate, prompted)
    return with_head(prompted)


def _without_prompt(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let targets, and positions of logits, be those of the tokens of the task."""
    kept, labels = kwargs.get("logits_to_keep"), kwargs.get("labels")
    if isinstance(kept, Tensor):
        kwargs = kwargs | {"logits_to_keep": kept + NUM_VIRTUAL_TOKENS}
    if labels is not None and labels.ndim == 2:
        # The last vector would predict the first token, which no other method does.
        labels = labels.clone()
        labels[:, 0] = IGNORED
        kwargs = kwargs | {"labels": labels}
    return args, kwargs


def _generate(
    prompted: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any
) -> Tensor:
    """Return rows that continue `input_ids`, whose padding is on the left.

    That of peft 0.21 repeats the vectors in every step with transformers 5.24, and puts
    padding between them and the tokens.
    """
    tokens = prompted.word_embeddings(input_ids)
    vectors = prompted.get_prompt(len(input_ids)).to(tokens.dtype)
    rows, mask = [], []
    for row, vector, kept in zip(tokens, vectors, attention_mask.bool(), strict=True):
        rows.append(torch.cat([row[~kept], vector, row[kept]]))
        there = torch.ones_like(kept[:1]).expand(len(vector))
        mask.append(torch.cat([kept[~kept], there, kept[kept]]).long())
    new = prompted.get_base_model().generate(
        inputs_embeds=torch.stack(rows), attention_mask=torch.stack(mask), **options
    )
    return torch.cat([input_ids, new], dim=1)


def _refuse_to_generate(**_: Any) -> Tensor:
    raise ValueError(
        "method 'prefix-tuning' cannot write answers: peft loses the keys and values "
        "in front while transformers generates. Take a task that ranks options, or "
        "'prompt-tuning'"
    )


def _refuse(model: PreTrainedModel, cell: Cell, kind: object) -> None:
    name = f"method {cell.method!r} with {type(model).__name__}"
    config = model.config
    if image_shape(config) is not None or config.is_encoder_decoder:
        raise ValueError(
            f"{name}, which takes no vectors in the place of tokens: take an encoder "
            "or a decoder of text, or another method, such as 'lora'"
        )
    is_classifier = bool(heads_of(model))
    if is_classifier and kind is PrefixTuningConfig:
        raise ValueError(
            f"{name}: classifiers of transformers take no keys and values from outside "
            "in training: take a language model, or another method, such as 'lora'"
        )
    if is_classifier and not hasattr(model, "classifier"):
        raise ValueError(
            f"{name}, which reads the last token of a row and cannot tell it from "
            "padding where it is given vectors: take an encoder, or a language model"
        )
    longest = num_positions(config)
    if longest is not None and longest < cell.seq_len + NUM_VIRTUAL_TOKENS:
        raise ValueError(
            f"{name}: `seq_len` is {cell.seq_len} and {NUM_VIRTUAL_TOKENS} vectors are "
            f"added, but the model has positions for {longest} tokens: lower it to at "
            f"most {longest - NUM_VIRTUAL_TOKENS}"
        )


prompt_tuning = partial(_with_prompt, kind=PromptTuningConfig)
p_tuning = partial(_with_prompt, kind=PromptEncoderConfig)
prefix_tuning = partial(_with_prompt, kind=PrefixTuningConfig)
