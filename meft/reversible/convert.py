"""`make_reversible`: a transformers model in, the same model out, reversible."""

from functools import partial
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from meft.backbone import blocks_of, find_bert, freeze_all_but_head, is_checkpointing
from meft.bottleneck import Bottleneck, wide_dtype
from meft.errors import ConfigError, UnsupportedModelError
from meft.reversible.config import ReversibleConfig
from meft.reversible.encoder import ReversibleEncoder
from meft.reversible.variants import make_adapters

Model = TypeVar("Model", bound=PreTrainedModel)


def make_reversible(model: Model, config: ReversibleConfig) -> Model:
    """Replace the encoder loop of a BERT by a reversible one, in place.

    The model keeps its class, its `forward` signature and its outputs. Afterwards the
    adapters and a newly made task head (`classifier`, `qa_outputs`) are trainable and
    everything else is frozen (Liao et al., NeurIPS 2023, section 4.1); change
    `requires_grad` afterwards to train more or less.

    Args:
        model: any `Bert*` class of transformers that is not a decoder.
        config: variant, scales, span, arithmetic and backward pass.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: not such a model, or already reversible, or with gradient
            checkpointing on.
        ConfigError: `config.span` reaches beyond the model's blocks.
    """
    bert = find_bert(model)
    if isinstance(bert.encoder, ReversibleEncoder):
        raise UnsupportedModelError("this model is reversible already")
    if is_checkpointing(model):
        raise UnsupportedModelError(
            "gradient checkpointing is on: a reversible stack rebuilds its activations "
            "already. Call `model.activation_checkpointing_disable()` first"
        )
    blocks = blocks_of(bert)
    first, end = config.span or (0, len(blocks))
    if end > len(blocks):
        raise ConfigError(
            f"`span` is {(first, end)}, but {type(model).__name__} has "
            f"{len(blocks)} blocks"
        )

    freeze_all_but_head(model)
    adapters = nn.ModuleDict()
    for index, block in enumerate(blocks[first:], first):
        weight = block.output.dense.weight
        make = partial(
            Bottleneck,
            bert.config.hidden_size,
            config.bottleneck_size,
            block.intermediate.intermediate_act_fn,
            bert.config.hidden_dropout_prob,
            bert.config.initializer_range,
        )
        made = make_adapters(config.variant, make)
        adapters[str(index)] = made.to(weight.device, wide_dtype(weight.dtype))
    encoder = ReversibleEncoder(bert.encoder, adapters, config, (first, end))
    bert.encoder = encoder.train(model.training)  # type: ignore[assignment]
    return model


def find_reversible(model: PreTrainedModel) -> ReversibleEncoder:
    """The reversible encoder inside `model`.

    Raises:
        UnsupportedModelError: `model` has not been through `make_reversible()`.
    """
    encoder = find_bert(model).encoder
    if not isinstance(encoder, ReversibleEncoder):
        raise UnsupportedModelError(
            f"this {type(model).__name__} is not reversible: call "
            "`meft.make_reversible(model, config)` first"
        )
    return encoder
