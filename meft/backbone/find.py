"""The lists of blocks in a model, and what prevents blocks from running in halves.

A model is recognised by the class of its blocks, so every head that transformers
provides for a family is supported, and so is every part of a model that has blocks of a
family.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import PreTrainedModel

from meft.backbone.families import FAMILIES, family_of
from meft.backbone.family import Family
from meft.errors import UnsupportedCallError, UnsupportedModelError

_TRANSFORMERS = Path(transformers.__file__).parent
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
    blocks: list[nn.Module]
    family: Family
    config: Any
    """Config of the model that loops over the list."""


def find_blocks(model: nn.Module) -> list[BlockList]:
    """Return every list of blocks of a supported family in `model`.

    Raises:
        UnsupportedModelError: there is none, or its blocks cannot be run in halves.
    """
    found = []
    for path, owner in model.named_modules():
        for attribute, child in owner.named_children():
            blocks = list(child) if isinstance(child, nn.ModuleList) else []
            # A block with a parallel adapter has its own class.
            kind = getattr(blocks[0], "plain", type(blocks[0])) if blocks else None
            family = family_of(kind) if kind else None
            if family is None:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            config = _config_of(model, path)
            _refuse(model, owner, family, blocks, config)
            found.append(
                BlockList(
                    name=name,
                    owner=owner,
                    attribute=attribute,
                    blocks=blocks,
                    family=family,
                    config=config,
                )
            )
    if not found:
        _refuse_compiled(model)
        names = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: it has no blocks of a known "
            f"family. Supported are transformers' {names}, with any head; a "
            "family is added by a file in `meft/backbone/families` (CONTRIBUTING.md, "
            "'Adding something')"
        )
    return found


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


def _other_forward(family: Family, index: int, block: nn.Module) -> str | None:
    """Return a reason if a block's class computes something else than the family's."""
    kind = getattr(block, "plain", type(block))
    if family_of(kind) is not family:
        return f"block {index} of a list is a {kind.__name__}, not a {family.block}"
    function: Any = vars(kind).get("forward")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and not _is_of_transformers(code.co_filename):
            return (
                f"the `forward` of the class {kind.__name__} was replaced (by "
                f"{code.co_filename}:{code.co_firstlineno}), and blocks that run in "
                "parts would not call it: convert the model without that patch"
            )
        function = getattr(function, "__wrapped__", None)
    return None


def _is_of_transformers(filename: str) -> bool:
    return Path(filename).is_relative_to(_TRANSFORMERS)


def _config_of(model: nn.Module, path: str) -> Any:
    """Return the config of the innermost module around `path` that has one."""
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if config is not None:
            return config
    return None


def _refuse(
    model: nn.Module,
    owner: nn.Module,
    family: Family,
    blocks: list[nn.Module],
    config: Any,
) -> None:
    reasons = [_other_forward(family, i, block) for i, block in enumerate(blocks)]
    reasons += [family.refuse(block) for block in blocks]
    if cast(float, getattr(owner, "layerdrop", 0.0)) > 0:
        reasons.append(f"{_DROPS_BLOCKS}: set it to 0 in the config")
    reason = next((reason for reason in reasons if reason), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {family.name}, but {reason}"
        )
