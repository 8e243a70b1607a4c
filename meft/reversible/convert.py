"""`make_reversible`: convert a transformers model to a reversible one in place."""

from functools import partial
from typing import TypeVar

from torch import nn

from meft.backbone.find import (
    BlockList,
    find_blocks,
    is_checkpointing,
    refuse_layerdrop,
)
from meft.backbone.parallel import NAME
from meft.bottleneck import Bottleneck, wide_dtype
from meft.errors import ConfigError, UnsupportedModelError
from meft.reversible.adapters import Adapters
from meft.reversible.blocks import CHECKPOINTING_IS_ON, ReversibleBlocks
from meft.reversible.config import ReversibleConfig
from meft.reversible.variants import make_adapters
from meft.saving import add_saving
from meft.trainable import choose_trainable

Model = TypeVar("Model", bound=nn.Module)


def make_reversible(model: Model, config: ReversibleConfig) -> Model:
    """Replace every list of blocks in a model by a reversible stack, in place.

    The model keeps its class, its `forward` signature and its outputs. Afterwards the
    adapters and a newly made task head (`classifier`, `qa_outputs`, `score`, ...) are
    trainable and everything else is frozen (Liao et al., NeurIPS 2023, section 4.1).
        If some parameters were frozen before and others were not, manually or because
        the
        model is a PeftModel, that choice is kept and the adapters are trained in
        addition.
        Change `requires_grad` afterwards to train more or fewer parameters.

        From then on, `model.save_pretrained` also writes the files of
        `meft.save_adapters`.

    Args:
        model: any class of a supported family, which `meft.backbone.families` lists, or
            a PeftModel that holds one.
        config: variant, arithmetic, span and backward pass.

    Returns:
        `model` itself.

    Raises:
        UnsupportedModelError: the model is not of a supported family, is already
            reversible, or has gradient checkpointing on.
        ConfigError: `config.span` reaches beyond the model's blocks.

    Warns:
        FrozenWarning: a task head was frozen before and stays frozen, or a head stays
            frozen because it may be pre-trained.
    """
    if find_stacks(model):
        raise UnsupportedModelError("this model is reversible already")
    if is_checkpointing(model):
        raise UnsupportedModelError(
            f"{CHECKPOINTING_IS_ON} before `meft.make_reversible`"
        )
    lists = find_blocks(model)
    for found in lists:
        if config.span is not None and config.span[1] > len(found.blocks):
            raise ConfigError(
                f"`span` is {config.span}, but {found.name} of {type(model).__name__} "
                f"has {len(found.blocks)} blocks"
            )
        _refuse_beside_parallel(found, config)
    choose_trainable(model)
    for found in lists:
        stack = _stack(found, config)
        setattr(found.owner, found.attribute, stack.train(model.training))
        if hasattr(found.owner, "layerdrop"):
            found.owner.register_forward_pre_hook(refuse_layerdrop)
    add_saving(model, ReversibleBlocks)
    return model


def find_stacks(model: nn.Module) -> dict[str, ReversibleBlocks]:
    """Return the reversible stacks in `model` by name; the result may be empty."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, ReversibleBlocks)}


def reversible_stacks(model: nn.Module) -> dict[str, ReversibleBlocks]:
    """Return the reversible stacks in `model` by name, of which there is at least one.

    Raises:
        UnsupportedModelError: `model` was not converted by `make_reversible()`.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise UnsupportedModelError(
            f"this {type(model).__name__} is not reversible: call "
            "`meft.make_reversible(model, config)` first"
        )
    return stacks


def _refuse_beside_parallel(found: BlockList, config: ReversibleConfig) -> None:
    """Refuse fields that do not work with parallel adapters of another method."""
    if not any(hasattr(block, NAME) for block in found.blocks):
        return
    for field, only, reason in (
        ("mlp_chunks", 1, "a chunk of tokens would choose neurons for itself"),
        ("on_mismatch", "raise", "gradients of rows cannot be taken back"),
    ):
        if getattr(config, field) != only:
            raise ConfigError(
                f"`{field}` must be {only!r} for a model with sparse adapters: {reason}"
            )


def _stack(found: BlockList, config: ReversibleConfig) -> ReversibleBlocks:
    first, end = config.span or (0, len(found.blocks))
    adapters = Adapters(config.function() | {"span": (first, end)})
    for index, block in enumerate(found.blocks[first:], first):
        shape = found.family.adapter_shape(block, found.owner.config)
        # Skip quantised weights, whose dtype is that of their storage.
        weight = next(p for p in block.parameters() if p.is_floating_point())
        make = partial(
            Bottleneck,
            shape.hidden_size,
            config.bottleneck_size,
            shape.activation,
            shape.dropout,
            shape.std,
        )
        # An adapter that only changes the stale stream of the last block has no effect,
        # unless the read-out mixes both streams.
        is_last = index == len(found.blocks) - 1
        unread = is_last and config.variant == "meft1" and config.arithmetic == "fixed"
        made = make_adapters(config.variant, make, only_f=unread)
        adapters[str(index)] = made.to(weight.device, wide_dtype(weight.dtype))
    return ReversibleBlocks(
        found.blocks, adapters, found.family, config, (first, end), found.owner.config
    )
