"""Replaces the lists of blocks of a transformers model by reversible stacks."""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

from torch import nn

from meft.backbone.find import BlockList, find_blocks, is_checkpointing
from meft.backbone.parallel import NAME
from meft.backbone.uncalled import allow_calls, refuse_calls
from meft.backbone.weights import refuse_without_derivative
from meft.bottleneck import Bottleneck, wide_dtype
from meft.errors import ConfigError, FrozenWarning, UnsupportedModelError
from meft.reversible.adapters import Adapters
from meft.reversible.blocks import CHECKPOINTING_IS_ON, ReversibleBlocks, find_stacks
from meft.reversible.config import ReversibleConfig
from meft.reversible.requests import unwatch, watch
from meft.reversible.variants import make_adapters
from meft.trainable import choose_trainable

Model = TypeVar("Model", bound=nn.Module)


def insert_stacks(model: Model, config: ReversibleConfig) -> Model:
    """Replace every list of blocks in a model by a reversible stack, in place.

    Arguments, result, errors and warnings are those of `meft.make_reversible`.
    """
    if not isinstance(config, ReversibleConfig):
        raise ConfigError(
            f"`config` must be a `meft.ReversibleConfig`, got {config!r}; for LoRA, "
            "call peft's `get_peft_model` first, and pass "
            "`ReversibleConfig(adapter=None)` here"
        )
    if find_stacks(model):
        raise UnsupportedModelError("this model is reversible already")
    if is_checkpointing(model):
        raise UnsupportedModelError(
            f"{CHECKPOINTING_IS_ON} before `meft.make_reversible`"
        )
    refuse_without_derivative(model)
    as_a_whole = config.adapter is None and config.mlp_chunks == 1
    lists = find_blocks(model, as_a_whole)
    for found in lists:
        if found.family.is_opaque and not as_a_whole:
            raise UnsupportedModelError(
                f"{found.name} of {type(model).__name__} has blocks that can only be "
                f"called as they are ({found.family.name}): that needs "
                "`ReversibleConfig(adapter=None)` and `mlp_chunks=1`"
            )
        if config.span is not None and config.span[1] > len(found.blocks):
            raise ConfigError(
                f"`span` is {config.span}, but {found.name} of {type(model).__name__} "
                f"has {len(found.blocks)} blocks"
            )
        _refuse_with_parallel(found, config)
        _refuse_chunks(found, config)
        for block in found.blocks if config.adapter else []:
            found.family.adapter_shape(block, found.config)  # raises what it raises now
    if config.adapter is not None:
        choose_trainable(model)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "nothing would be trained: no parameter requires a gradient, and "
            "`adapter=None` adds none. Call `model.requires_grad_(True)`, or peft's "
            "`get_peft_model` before `meft.make_reversible`",
            FrozenWarning,
            stacklevel=3,
        )
    for found in lists:
        stack = _stack(found, config)
        setattr(found.owner, found.attribute, stack.train(model.training))
        watch(model, found.owner)
    return model


def remove_stacks(model: nn.Module) -> None:
    """Undo `insert_stacks`, except for which parameters are trainable."""
    for owner in list(model.modules()):
        for attribute, stack in list(owner.named_children()):
            if isinstance(stack, ReversibleBlocks):
                blocks = plain_list(stack)
                setattr(owner, attribute, blocks)
                for block in blocks:
                    allow_calls(block)
    unwatch(model)


@contextlib.contextmanager
def without_stacks(model: nn.Module) -> Iterator[None]:
    """Run the body with plain lists of blocks in the place of stacks."""
    replaced = [
        (owner, attribute, stack)
        for owner in list(model.modules())
        for attribute, stack in owner.named_children()
        if isinstance(stack, ReversibleBlocks)
    ]
    for owner, attribute, stack in replaced:
        setattr(owner, attribute, plain_list(stack))
        for block in dict.fromkeys(stack.blocks):
            allow_calls(block)
    unwatch(model)
    try:
        yield
    finally:
        for owner, attribute, stack in replaced:
            setattr(owner, attribute, stack)
            watch(model, owner)
            for block in dict.fromkeys(stack.blocks[stack.span[0] :]):
                refuse_calls(block)


def plain_list(stack: ReversibleBlocks) -> nn.ModuleList:
    """Return the blocks of a stack as the list that it has replaced."""
    blocks = nn.ModuleList(list(stack))
    blocks.training = stack.training
    return blocks


def _refuse_with_parallel(found: BlockList, config: ReversibleConfig) -> None:
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


def _refuse_chunks(found: BlockList, config: ReversibleConfig) -> None:
    """Refuse chunks of tokens for blocks that leave out a half for whole rows."""
    if config.mlp_chunks == 1:
        return
    for block, part in ((b, part) for b in found.blocks for part in b.modules()):
        rate = getattr(part, "drop_prob", None)
        if type(part).__name__.endswith("DropPath") and rate:
            raise ConfigError(
                f"`mlp_chunks` must be 1 for a {type(block).__name__} with a "
                f"{type(part).__name__} of {rate}: it leaves out the half for some "
                "rows, and a chunk has tokens of several rows. Or set "
                "`drop_path_rate=0.0` in the config of the model"
            )


def _stack(found: BlockList, config: ReversibleConfig) -> ReversibleBlocks:
    first, end = config.span or (0, len(found.blocks))
    first = max(first, found.family.prefix(found.config))
    if first >= end:
        raise ConfigError(
            f"no block of {found.name} would be rebuilt: `span` is {config.span}, and "
            f"in a {found.family.name} with this config block 0 stays as it is"
        )
    adapters = Adapters(config.function() | {"span": (first, end)})
    if config.variant is not None:
        _add_adapters(adapters, found, config, config.variant, first)
    return ReversibleBlocks(
        found.listed, adapters, found.family, config, (first, end), found.config
    )


def _add_adapters(
    adapters: Adapters,
    found: BlockList,
    config: ReversibleConfig,
    variant: str,
    first: int,
) -> None:
    """Create the adapters of the blocks from number `first` up."""
    for index, block in enumerate(found.blocks[first:], first):
        shape = found.family.adapter_shape(block, found.config)
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
        unread = is_last and variant == "meft1" and config.arithmetic == "fixed"
        made = make_adapters(variant, make, only_f=unread)
        adapters[str(index)] = made.to(weight.device, wide_dtype(weight.dtype))
