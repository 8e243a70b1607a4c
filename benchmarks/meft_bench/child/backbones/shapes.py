"""Random weights in published shapes; the tiny shapes, except BERT's, are our own.

Memory and speed depend on the shape only. The model is created on the cell's device and
in the dtype of its weights, so that a large model needs no memory on the host.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meft_bench.child.backbones.classifier import (
    model_class,
    options,
    set_depth_of_config,
    set_up_config,
)
from meft_bench.child.backbones.files import read_config
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import RANDOM_BACKBONES, nearest

_TINY = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": ("bert", _TINY | {"intermediate_size": 512}),
    "bert-base": ("bert", {}),
    "bert-large": (
        "bert",
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "roberta-tiny": (
        "roberta",
        _TINY
        | {
            "intermediate_size": 512,
            # RoBERTa's published values; transformers' defaults here are BERT's.
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "roberta-large": (
        "roberta",
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "bart-tiny": (
        "bart",
        _TINY
        | {
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
        },
    ),
    "bart-large": ("bart", {}),
    "opt-tiny": ("opt", _TINY | {"ffn_dim": 512}),
    "opt-125m": ("opt", {}),
    "opt-1.3b": (
        "opt",
        {
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "ffn_dim": 8192,
        },
    ),
    "opt-6.7b": (
        "opt",
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "ffn_dim": 16384,
        },
    ),
    "opt-66b": (
        "opt",
        {
            "num_hidden_layers": 64,
            "hidden_size": 9216,
            "num_attention_heads": 72,
            "ffn_dim": 36864,
        },
    ),
    "llama-tiny": ("llama", _TINY | {"intermediate_size": 344}),
    "llama-7b": ("llama", {}),
    "mistral-tiny": (
        "mistral",
        _TINY
        | {
            "intermediate_size": 448,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
        },
    ),
    "mistral-7b": ("mistral", {"max_position_embeddings": 32768}),
    "vit-tiny": (
        "vit",
        _TINY | {"intermediate_size": 512, "image_size": 32, "patch_size": 8},
    ),
    "vit-large": (
        "vit",
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
}
"""The `model_type` of each of `RANDOM_BACKBONES`, and the changes to its config.

The changes are relative to transformers' default config of that type, vocabulary
included.
"""


def build(
    config: PreTrainedConfig, cell: Cell, num_labels: int | None
) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        config: config of the model; changed in place.
        cell: the cell that the model is for.
        num_labels: number of classes of the head; None for a language model.
    """
    set_up_config(config, cell, num_labels)
    if cell.depth:
        set_depth_of_config(config, cell.depth)
    with torch.device(cell.device):
        model: PreTrainedModel = model_class(config, num_labels).from_config(
            config, **options(cell)
        )
    return model


def find_config(name: str) -> PreTrainedConfig:
    """Return the config that `random:NAME` denotes."""
    if name in RANDOM_BACKBONES:
        model_type, fields = SHAPES[name]
        config: PreTrainedConfig = CONFIG_MAPPING[model_type](**fields)
        return config
    if not name.endswith(".json"):
        valid = [*RANDOM_BACKBONES, "PATH/config.json"]
        raise ValueError(f"unknown shape in random:{name}; {nearest(name, valid)}")
    return read_config(Path(name))
