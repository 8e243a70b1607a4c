"""Classifiers of all families: head, blocks, depth and dtype.

A classifier is a `...ForSequenceClassification` of transformers, or for images a
`...ForImageClassification`, with blocks that the library finds in one list. BART has
two lists, one in its encoder and one in its decoder; `depth` and `reversible_blocks`
apply to each. `weights_dtype` applies to the backbone only: the head is new and is
trained, so the head, its input and the loss are float32.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from meft.backbone.find import find_blocks
from meft.backbone.heads import NEW_HEADS
from meft_bench.shared import backbones, registry
from meft_bench.shared.cell import Cell

CAUSAL_LM_TYPES = backbones.types_of("causal-lm")
"""Model types that support tasks with questions."""

LANGUAGE_MODELS = backbones.types_of("causal-lm", "seq2seq-lm")
"""Model types that support language modelling on given tokens.

BART derives its decoder's input from these tokens; tasks with questions do not support
a second stack.
"""

WEIGHTS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _type_of(config: PreTrainedConfig) -> backbones.ModelType:
    return backbones.TABLE[config.model_type]


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int] | None:
    """Return `channels height width` of a model's images; None if it reads text."""
    kind = backbones.TABLE.get(config.model_type)
    if kind is None or "image-classifier" not in kind.models:
        return None
    return (config.num_channels, *_pair(config.image_size))


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of a classifier, lowest first, the encoder's before the
    decoder's.
    """
    return [block for found in find_blocks(model) for block in found.blocks]


def heads_of(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a classifier without pre-trained weights; there is one."""
    parts = [getattr(model, name, None) for name in NEW_HEADS]
    return [part for part in parts if isinstance(part, nn.Module)]


def set_depth(model: PreTrainedModel, depth: int) -> None:
    """Keep the first `depth` blocks of every list, or repeat all of them in a cycle.

    A repeated block is a copy with its own parameters.
    """
    for found in find_blocks(model):
        blocks = found.blocks
        chosen = [
            blocks[i] if i < len(blocks) else copy.deepcopy(blocks[i % len(blocks)])
            for i in range(depth)
        ]
        module: Any
        for index, block in enumerate(chosen):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        setattr(found.owner, found.attribute, nn.ModuleList(chosen))
        # The two configs are not always the same object, and both are read.
        for config in (model.config, found.config):
            set_depth_of_config(config, depth)


_OF_EACH_BLOCK = ("layer_types", "no_rope_layers")
"""Fields of configs with an entry for each block."""


def set_depth_of_config(config: PreTrainedConfig, depth: int) -> None:
    """Set the number of blocks per list in a config to `depth`.

    What it says of every block is repeated as often as blocks are.
    """
    config.num_hidden_layers = depth
    for name in _OF_EACH_BLOCK:
        values = getattr(config, name, None)
        if values:
            setattr(config, name, [values[i % len(values)] for i in range(depth)])
    if config.is_encoder_decoder:  # `num_hidden_layers` is the encoder's
        config.decoder_layers = depth


def model_class(config: PreTrainedConfig, num_labels: int | None) -> Any:
    """Return transformers' factory of classifiers, or of language models for None.

    Args:
        config: config of the model.
        num_labels: number of classes; None for a language model.
    """
    kind = _type_of(config)
    if num_labels is None:
        is_seq2seq = "seq2seq-lm" in kind.models
        return AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    if kind.classifier:
        return registry.load(f"{backbones.CLASSES}.{kind.classifier}")
    if "image-classifier" in kind.models:
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification


def set_up_config(config: PreTrainedConfig, cell: Cell, num_labels: int | None) -> None:
    """Set up a config for a classifier or a language model.

    Args:
        config: config of the model; changed in place.
        cell: the cell that the model is for.
        num_labels: number of classes, 1 for a number; None leaves the config that of a
            language model.

    Raises:
        ValueError: `cell.seq_len` is larger than the number of positions of the model,
            or not the number of tokens of an image; or the task is text and the model
            is for images; or the task needs a language model and the family has none.
    """
    if num_labels is None:
        _check_language_model(config, cell)
    if _type_of(config).has_eager_attention_only and cell.attention != "eager":
        raise ValueError(
            f"`attention` is {cell.attention!r}, and transformers has eager attention "
            f"only for {cell.backbone} ({config.model_type}): set it to 'eager'"
        )
    shape = image_shape(config)
    if shape is None:
        _check_text(config, cell)
    else:
        _check_images(config, cell, shape)
    config.use_cache = False
    if config.is_encoder_decoder:  # which a config of T5 may lack
        start = getattr(config, "decoder_start_token_id", None)
        config.decoder_start_token_id = start if start is not None else 0
    if num_labels is not None:
        config.num_labels = num_labels
        config.problem_type = backbones.problem_type(num_labels)


def _check_language_model(config: PreTrainedConfig, cell: Cell) -> None:
    able = LANGUAGE_MODELS if cell.task == "synthetic-lm" else CAUSAL_LM_TYPES
    if config.model_type not in able:
        raise ValueError(
            f"task {cell.task!r} wants a language model of {', '.join(able)}, and "
            f"{cell.backbone} is of model_type {config.model_type!r}: take one of "
            "these, `smollm2-135m` for one"
        )


def num_image_tokens(config: PreTrainedConfig, shape: tuple[int, int, int]) -> int:
    """Return the number of tokens that a model makes of an image.

    Args:
        config: its config.
        shape: `channels height width`.
    """
    patches = zip(shape[1:], _pair(config.patch_size), strict=True)
    return 1 + math.prod(side // patch for side, patch in patches)


def _check_images(
    config: PreTrainedConfig, cell: Cell, shape: tuple[int, int, int]
) -> None:
    if cell.task not in ("synthetic", *registry.IMAGE_TASKS):
        raise ValueError(
            f"task {cell.task!r} has text and {cell.backbone} sees images: take task "
            f"`synthetic`, {', '.join(f'`{n}`' for n in registry.IMAGE_TASKS)}, or a "
            "backbone of text"
        )
    num_tokens = num_image_tokens(config, shape)
    if cell.seq_len != num_tokens:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but {cell.backbone} makes {num_tokens} "
            f"tokens of an image: set it to {num_tokens}"
        )


POSITIONS_AFTER_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet"),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Types of models besides those of the table whose positions start after padding."""


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens of the longest row of a model; None for no limit."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    kind = backbones.TABLE.get(config.model_type)
    is_after = kind is not None and kind.positions_start_after_padding
    if is_after or config.model_type in POSITIONS_AFTER_PADDING:
        longest -= (config.pad_token_id or 0) + 1
    return longest


def _check_text(config: PreTrainedConfig, cell: Cell) -> None:
    if cell.task in registry.IMAGE_TASKS:
        raise ValueError(
            f"task {cell.task!r} has images and {cell.backbone} reads text: take a "
            "backbone of images, such as `random:vit-tiny`"
        )
    longest = num_positions(config)
    if longest is not None and cell.seq_len > longest:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but {cell.backbone} has positions for "
            f"{longest} tokens: lower it to at most {longest}"
        )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width; a config may have one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def options(cell: Cell) -> dict[str, Any]:
    """Return the options with which transformers makes the model of `cell`.

    Which of torch's attention kernels is used, as set in `cell.attention`, is decided
    when the model runs.
    """
    return {
        "dtype": WEIGHTS_DTYPES[cell.unquantised_dtype],
        "attn_implementation": "eager" if cell.attention == "eager" else "sdpa",
    }


def finish(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, cell: Cell
) -> None:
    """Set the padding token of a text model, and initialise a classifier's head.

    The head is in float32. It is initialised even if the weights include one, and as
    the last step, so that it depends only on the seed.

    Args:
        model: the model; changed in place.
        tokenizer: its tokenizer; None if it has none.
        cell: the cell that the model is for.
    """
    # Set on the finished model: an embedding that is created with a padding token does
    # not train its row, and the padding token may be the end token.
    reads = image_shape(model.config) is None
    if reads and model.config.pad_token_id is None:
        model.config.pad_token_id = _padding(model.config, tokenizer, cell)
    _initialise(heads_of(model), _std_of_head(model), cell)


def _std_of_head(model: PreTrainedModel) -> float:
    found, *_ = find_blocks(model)
    return found.family.adapter_shape(found.blocks[0], found.config).std


def finish_any(
    model: PreTrainedModel,
    heads: Sequence[nn.Module],
    std: float,
    tokenizer: PreTrainedTokenizerBase | None,
    cell: Cell,
) -> None:
    """Do the same for a model of a family that is not known.

    Args:
        model: the model; changed in place.
        heads: its heads.
        std: standard deviation of the weights of a head.
        tokenizer: its tokenizer; None if it has none.
        cell: the cell that the model is for.
    """
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = _padding(model.config, tokenizer, cell)
    _initialise(heads, std, cell)


def _initialise(heads: Sequence[nn.Module], std: float, cell: Cell) -> None:
    for head in heads:
        head.float()
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if cell.unquantised_dtype != "fp32":
            head.register_forward_pre_hook(_in_float32)


def _padding(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, cell: Cell
) -> int:
    """Return the id of the padding token, or of the end token.

    Args:
        config: config of the model.
        tokenizer: its tokenizer; None for random weights.
        cell: the cell that the model is for, whose backbone an error names.

    Raises:
        ValueError: there is neither.
    """
    own: int | None = None if tokenizer is None else tokenizer.pad_token_id
    if own is not None:
        return own
    end: int | list[int] | None = config.eos_token_id
    if end is None and cell.backbone.startswith("random:"):
        return 0  # no token means anything to random weights
    if end is None:
        raise ValueError(
            "the model has neither a padding token nor an end token to pad with: set "
            "`pad_token_id` in its config.json"
        )
    return end[0] if isinstance(end, list) else end


def _in_float32(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in args)
