"""Tiny BERT models, every block with weights of its own, and batches for them."""

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainedModel,
)

import meft
from meft.reversible.blocks import ReversibleBlocks, reversible_stacks

VOCAB, LABELS = 50, 3


def bert_config(
    depth: int = 2, dropout: float = 0.0, hidden: int = 16, labels: int = LABELS
) -> BertConfig:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = labels
    return config


def classifier(
    depth: int = 2, dropout: float = 0.0, hidden: int = 16
) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(depth, dropout, hidden))


def reversible(
    depth: int = 2,
    dropout: float = 0.0,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    save_backbone: bool = False,
    **config: Any,
) -> BertForSequenceClassification:
    """A small reversible classifier in training mode."""
    model = classifier(depth, dropout, hidden)
    nn.Module.to(model, dtype)
    torch.manual_seed(1)
    options = {"bottleneck_size": 3, **config}
    meft.make_reversible(
        model, meft.ReversibleConfig(**options), save_backbone=save_backbone
    )
    model.train()
    return model


def only_stack(model: PreTrainedModel) -> ReversibleBlocks:
    """The reversible stack of a model that has one."""
    (stack,) = reversible_stacks(model).values()
    return stack


def batch(rows: int = 3, seq: int = 7, padded: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    mask = torch.ones(rows, seq, dtype=torch.long)
    if padded:
        mask[0, seq // 2 :] = 0
    return {
        "input_ids": torch.randint(0, VOCAB, (rows, seq)),
        "attention_mask": mask,
        "labels": torch.randint(0, LABELS, (rows,)),
    }


def heads() -> list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
    """One model per kind of head, with a batch that gives it a loss."""
    torch.manual_seed(0)
    rows = batch()
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    positions = torch.tensor([1, 2, 3])
    return [
        (BertForSequenceClassification(bert_config()), rows),
        (
            BertForQuestionAnswering(bert_config(labels=2)),
            inputs | {"start_positions": positions, "end_positions": positions},
        ),
        (BertForMaskedLM(bert_config()), inputs | {"labels": rows["input_ids"]}),
    ]


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy of what a backward left at `parameter`."""
    assert parameter.grad is not None
    return parameter.grad.clone()


def gradients(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], seed: int = 3
) -> dict[str, torch.Tensor]:
    """The gradient of the batch's loss for every trainable parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    return {
        name: gradient(p) for name, p in model.named_parameters() if p.requires_grad
    }
