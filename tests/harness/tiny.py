"""Small classifiers of every text family, every block with weights of its own."""

from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meft_bench.child.backbones.classifier import model_class
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.tasks.question import AnswerTask, Question
from meft_bench.shared.cell import Cell

HIDDEN, BLOCKS, LABELS, VOCABULARY = 32, 3, 2, 50

SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "num_labels": LABELS,
}
FAMILIES: dict[str, dict[str, object]] = {
    "bert": {"intermediate_size": 64},
    "roberta": {"intermediate_size": 64, "max_position_embeddings": 42},
    "bart": {
        "decoder_layers": BLOCKS,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    "opt": {"ffn_dim": 64},
    "llama": {"intermediate_size": 64, "num_key_value_heads": 1},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 1},
    "qwen3": {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {"intermediate_size": 64},
}
"""What each `model_type` adds to the shape; all have positions for 40 tokens.

The others have blocks of the same kinds, which tests/library asks the same questions.
"""


def num_lists(model_type: str) -> int:
    """Lists of `BLOCKS` blocks: an encoder's and a decoder's in BART."""
    return 2 if model_type == "bart" else 1


def classifier(model_type: str = "bert", **changes: object) -> Any:
    """A `...ForSequenceClassification`, always with the same weights."""
    fields: dict[str, Any] = SHAPE | FAMILIES[model_type] | changes
    config = CONFIG_MAPPING[model_type](**fields)
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id or 1
    torch.manual_seed(0)
    return model_class(config, LABELS).from_config(config)


def cell(**changes: object) -> Cell:
    fields: dict[str, object] = {"method": "full", "batch_size": 4, "seq_len": 8}
    return Cell(**(fields | changes))  # type: ignore[arg-type]


def batch(batch_size: int = 4, seq_len: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, seq_len)
    return {
        "input_ids": torch.randint(VOCABULARY, shape, generator=generator),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.arange(batch_size) % LABELS,
    }


def task_of(metric: str, *questions: Question, **changes: Any) -> AnswerTask:
    """A task that asks the same questions in training and evaluation."""
    fields: dict[str, Any] = {
        "name": "made up",
        "train": questions,
        "validation": (),
        "evaluation": questions,
        "metric": metric,
        "max_new_tokens": 3,
        "origin": "made up",
    }
    return AnswerTask(**fields | changes)
