"""The lists of blocks in a model, and what prevents blocks from running in halves.

A model is recognised by the class of its blocks, so every head that transformers
provides for a family is supported, and so is every part of a model that has blocks of a
family.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from meft.backbone.families import FAMILIES, family_of
from meft.backbone.family import Family
from meft.backbone.layout import OPAQUE
from meft.backbone.unlisted import (
    family_for,
    is_checkpointed,
    nearest,
    opaque_family,
    refuse_missing,
)
from meft.errors import UnsupportedCallError, UnsupportedModelError

_DROPS_BLOCKS = (
    "its loop drops whole blocks at random (`layerdrop` above 0), which a stack that "
    "runs as one cannot do"
)
"""Part of error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockList:
    """A list of blocks inside a model."""

    name: str
    """Name of the list in the model, `bert.encoder.layer`."""
    owner: nn.Module
    """Module whose forward loops over the list."""
    attribute: str
    """Name of the list in its owner, `layer`."""
    listed: list[nn.Module]
    blocks: list[nn.Module]
    """The blocks in the order in which the loop calls them, some perhaps repeatedly."""
    family: Family
    config: Any
    """Config of the model that loops over the list."""


def find_blocks(model: nn.Module, as_a_whole: bool = False) -> list[BlockList]:
    """Return every list of blocks of a supported family in `model`.

    Image towers of which a model reads hidden states between blocks, as LLaVA does, are
    left out.

    Args:
        model: the model.
        as_a_whole: whether blocks may be called themselves, and need not be known: all
            lists are returned whose blocks transformers can checkpoint.

    Raises:
        UnsupportedModelError: there is none, or its blocks cannot be run in halves.
    """
    found = []
    for path, owner in model.named_modules():
        for attribute, child in owner.named_children():
            blocks = list(child) if isinstance(child, nn.ModuleList) else []
            family = _family_of_all(blocks, as_a_whole) if blocks else None
            if family is None or _is_read_between(model, path):
                continue
            name = f"{path}.{attribute}".lstrip(".")
            config = _config_of(model, path)
            _refuse(model, owner, family, blocks, config)
            found.append(
                BlockList(
                    name=name,
                    owner=owner,
                    attribute=attribute,
                    listed=blocks,
                    blocks=[blocks[i] for i in family.calls(config, len(blocks))],
                    family=family,
                    config=config,
                )
            )
    if not found:
        _refuse_compiled(model)
        names = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: it has no blocks of a known "
            f"family{_nearest(model)}. Supported are transformers' {names}, with any "
            "head, and models whose blocks have the same structure under the same "
            "names. `meft.register_family` describes the blocks of another model. "
            "Without adapters of ours, `ReversibleConfig(adapter=None)` with "
            "`mlp_chunks=1`, the blocks of any model work that transformers can "
            "checkpoint"
        )
    return found


def _family_of_all(blocks: list[nn.Module], as_a_whole: bool) -> Family | None:
    """Return the family of the blocks of a list; None if there is none.

    Args:
        blocks: all modules of the list.
        as_a_whole: as for `find_blocks`.
    """
    family = family_for(blocks[0])
    if not as_a_whole or not (family is None or family.is_guess):
        return family
    if family is not None and all(map(family.has, blocks)):
        return replace(family, layouts=(*family.layouts, OPAQUE))
    is_opaque = all(map(is_checkpointed, blocks)) and not any(map(_has_inside, blocks))
    return opaque_family(blocks) if is_opaque else None


def _has_inside(block: nn.Module) -> bool:
    """Return whether there is a list of blocks of a known class in a block."""
    lists = (part for part in block.modules() if isinstance(part, nn.ModuleList))
    return any(len(found) and family_for(found[0]) for found in lists)


def _nearest(model: nn.Module) -> str:
    """Describe what the blocks of a model lack, as a part of a sentence."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    sizes = {id(m): sum(p.numel() for p in m.parameters()) for m in lists}
    largest = max(lists, key=lambda m: sizes[id(m)], default=None)
    return f" ({nearest(largest[0])})" if largest is not None else ""


def transformers_model(model: nn.Module) -> nn.Module:
    """Return the transformers model in a wrapper such as peft's, otherwise `model`."""
    inside = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return next(inside, model)


def is_checkpointing(model: nn.Module) -> bool:
    """Return whether any block of `model` has gradient checkpointing switched on."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def refuse_layerdrop(owner: Any, args: tuple[Any, ...]) -> None:
    """Refuse a `layerdrop` that was set after the conversion; a forward pre-hook.

    The loop of `owner` would skip all blocks at once.

    Raises:
        UnsupportedCallError: `owner` is in training mode and has a `layerdrop`.
    """
    if owner.training and owner.layerdrop > 0:
        raise UnsupportedCallError(
            f"`layerdrop` of this {type(owner).__name__} was set to {owner.layerdrop} "
            f"after the conversion: {_DROPS_BLOCKS}. Set it back to 0"
        )


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        plain = getattr(module, "_orig_mod", None)  # set by `torch.compile`
        if plain is not None and family_of(type(plain)) is not None:
            raise UnsupportedModelError(
                f"the blocks of this {type(model).__name__} were compiled by "
                f"`torch.compile`, and a {type(plain).__name__} has to be run in parts:"
                " convert the plain model, then call `module.compile()` on modules "
                "inside its blocks, such as attention and MLP"
            )


def _is_read_between(model: nn.Module, path: str) -> bool:
    """Return whether a model reads hidden states from inside the loop of an owner.

    Args:
        model: the model.
        path: name of the owner of a list of blocks.
    """
    parts = path.split(".") if path else []
    for end in range(len(parts)):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        layers = getattr(config, "vision_feature_layer", None)
        if layers is None:
            layers = getattr(config, "vision_feature_layers", None)
        if layers is not None and any("vision" in name for name in parts[end:]):
            return True
    return False


def _config_of(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost module around `path` that has one."""
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if config is not None:
            return config
    return None


def _jitter(block: nn.Module) -> str | None:
    """Return the reason why a block with noise before its router cannot be run."""
    for part in block.modules():
        for name in ("jitter_noise", "router_jitter_noise"):
            if getattr(part, name, 0):
                return (
                    f"its {type(part).__name__} multiplies its input by noise in place "
                    f"(`{name}` above 0), which an adapter reads too: set "
                    "`router_jitter_noise=0.0` in the config"
                )
    return None


def _refuse(
    model: nn.Module,
    owner: nn.Module,
    family: Family,
    blocks: list[nn.Module],
    config: Any,
) -> None:
    reasons: list[str | None] = [
        f"block {i} of a list is a {type(block).__name__}, not a {family.block}"
        for i, block in enumerate(blocks)
        if not family.has(block)
    ]
    reasons += [family.refuse(block) or _jitter(block) for block in blocks]
    rate = getattr(owner, "layerdrop", getattr(config, "layerdrop", 0.0))
    if cast(float, rate or 0.0) > 0:
        reasons.append(f"{_DROPS_BLOCKS}: set it to 0 in the config")
    for block in blocks:
        refuse_missing(family, block)
    reason = next((reason for reason in reasons if reason), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {family.name}, but {reason}"
        )
