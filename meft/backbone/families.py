"""Which families there are, and where a model keeps its blocks.

A model is recognised by the class of its blocks, so every head that transformers puts
on a family is supported, and so is every part of a model that has blocks of one.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from meft.backbone.bart import BART_DECODER, BART_ENCODER
from meft.backbone.bert import BERT, ROBERTA
from meft.backbone.family import Family
from meft.backbone.llama import LLAMA, MISTRAL
from meft.backbone.opt import OPT
from meft.backbone.parallel import NAME
from meft.backbone.vit import DEIT, VIT
from meft.errors import UnsupportedCallError, UnsupportedModelError

FAMILIES = (
    BERT,
    ROBERTA,
    OPT,
    BART_ENCODER,
    BART_DECODER,
    LLAMA,
    MISTRAL,
    VIT,
    DEIT,
)


def family_of(block: type[nn.Module]) -> Family:
    """The family whose blocks are of class `block`."""
    return next(family for family in FAMILIES if family.block is block)


NEW_HEADS = (
    "classifier",
    "qa_outputs",
    "score",
    "classification_head",
    "cls_classifier",
    "distillation_classifier",
)
"""Attributes that hold a task head without pre-trained weights, which must train.
Poolers and language-model heads are pre-trained and stay frozen."""
_DROPS_BLOCKS = (
    "its loop drops whole blocks at random (`layerdrop` above 0), which a stack that "
    "runs as one cannot do"
)
"""A part of error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockList:
    """A list of blocks inside a model."""

    name: str
    """Of the list in the model, `bert.encoder.layer`."""
    owner: nn.Module
    """Whose forward loops over the list."""
    attribute: str
    """Of the list in its owner, `layer`."""
    blocks: list[nn.Module]
    family: Family


def find_blocks(model: nn.Module) -> list[BlockList]:
    """Every list of blocks of a known family in `model`, as often as there is one.

    Raises:
        UnsupportedModelError: there is none, or its blocks cannot be taken apart.
    """
    families = {family.block: family for family in FAMILIES}
    found = []
    for path, owner in model.named_modules():
        for attribute, child in owner.named_children():
            blocks = list(child) if isinstance(child, nn.ModuleList) else []
            # A block that carries a parallel adapter has a class of its own.
            kind = getattr(blocks[0], "plain", type(blocks[0])) if blocks else None
            if kind not in families:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            family = families[kind]
            _refuse(model, owner, family, blocks)
            found.append(
                BlockList(
                    name=name,
                    owner=owner,
                    attribute=attribute,
                    blocks=blocks,
                    family=family,
                )
            )
    if not found:
        _refuse_compiled(model, families)
        names = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: it has no blocks of a known "
            f"family. Supported are transformers' {names}, with any head"
        )
    return found


def transformers_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper such as peft's; else `model` itself."""
    inside = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return next(inside, model)


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What came with the transformers models inside `model`, each parameter once.

    Neither what a module around them has of its own, nor parallel adapters.
    """
    inside: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, PreTrainedModel)
    ]
    added = [m for name, m in model.named_modules() if name.endswith(f".{NAME}")]
    ours = {id(p) for module in added for p in module.parameters()}
    found = {id(p): p for m in inside or [model] for p in m.parameters()}
    return [parameter for key, parameter in found.items() if key not in ours]


def freeze_all_but_head(model: nn.Module) -> None:
    """Freeze what came with the model, except a task head without trained weights.

    Parallel adapters that another method has added stay as they are, and so does what a
    module around the transformers model has of its own.
    """
    for parameter in backbone_parameters(model):
        parameter.requires_grad_(False)
    for name in NEW_HEADS:
        head = getattr(transformers_model(model), name, None)
        if isinstance(head, nn.Module):
            head.requires_grad_(True)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any block of `model` has gradient checkpointing switched on."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def refuse_layerdrop(owner: Any, args: tuple[Any, ...]) -> None:
    """Refuse a `layerdrop` that was set after the conversion: the loop of `owner` would
    leave out all blocks at once. A forward pre-hook.

    Raises:
        UnsupportedCallError: `owner` is in training mode and has a `layerdrop`.
    """
    if owner.training and owner.layerdrop > 0:
        raise UnsupportedCallError(
            f"`layerdrop` of this {type(owner).__name__} was set to {owner.layerdrop} "
            f"after the conversion: {_DROPS_BLOCKS}. Set it back to 0"
        )


def _refuse_compiled(model: nn.Module, families: dict[type[nn.Module], Family]) -> None:
    for module in model.modules():
        plain = getattr(module, "_orig_mod", None)  # of what `torch.compile` returns
        if type(plain) in families:
            raise UnsupportedModelError(
                f"the blocks of this {type(model).__name__} were compiled by "
                f"`torch.compile`, and a {type(plain).__name__} has to be run in parts:"
                " convert the plain model, then call `module.compile()` on modules "
                "inside its blocks, such as attention and MLP"
            )


def _refuse(
    model: nn.Module, owner: nn.Module, family: Family, blocks: list[nn.Module]
) -> None:
    reasons = [family.refuse(block) for block in blocks]
    if cast(float, getattr(owner, "layerdrop", 0.0)) > 0:
        reasons.append(f"{_DROPS_BLOCKS}: set it to 0 in the config")
    reason = next((reason for reason in reasons if reason), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {family.name}, but {reason}"
        )
