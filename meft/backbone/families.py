"""The supported families, and functions that find a model's blocks and heads.

A model is recognised by the class of its blocks, so every head that transformers
provides for a family is supported, and so is every part of a model that has blocks of a
family.
"""

import inspect
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
    """Return the family whose blocks are of class `block`."""
    return next(family for family in FAMILIES if family.block is block)


NEW_HEADS = (
    "classifier",
    "qa_outputs",
    "score",
    "classification_head",
    "cls_classifier",
    "distillation_classifier",
)
"""Attributes of transformers' models that hold a task head without pre-trained weights,
which must be trained. Poolers and language-model heads are pre-trained and stay frozen.
"""
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


def find_blocks(model: nn.Module) -> list[BlockList]:
    """Return every list of blocks of a supported family in `model`.

    Raises:
        UnsupportedModelError: there is none, or its blocks cannot be run in halves.
    """
    families = {family.block: family for family in FAMILIES}
    found = []
    for path, owner in model.named_modules():
        for attribute, child in owner.named_children():
            blocks = list(child) if isinstance(child, nn.ModuleList) else []
            # A block with a parallel adapter has its own class.
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
    """Return the transformers model in a wrapper such as peft's, otherwise `model`."""
    inside = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return next(inside, model)


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the transformers models in `model`, each once.

    Parameters of modules around them and of parallel adapters are not included.
    """
    inside: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, PreTrainedModel)
    ]
    added = [m for name, m in model.named_modules() if name.endswith(f".{NAME}")]
    ours = {id(p) for module in added for p in module.parameters()}
    found = {id(p): p for m in inside or [model] for p in m.parameters()}
    return [parameter for key, parameter in found.items() if key not in ours]


def freeze_all_but_head(model: nn.Module) -> None:
    """Freeze the parameters of the model, except task heads without trained weights.

    Parallel adapters that another method has added do not change, and neither do the
    parameters of modules around the transformers models.
    """
    for parameter in backbone_parameters(model):
        parameter.requires_grad_(False)
    for head in new_heads(model).values():
        head.requires_grad_(True)


def new_heads(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Return the heads without pre-trained weights of the models inside `model`.

    These are task heads of transformers' own classes and all modules and parameters
    that a user's class adds to these classes, by name in `model`.
    """
    inside = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    found: dict[str, nn.Module | nn.Parameter] = {}
    models: dict[str, nn.Module] = {**inside} or {"": model}
    for path, module in models.items():
        heads: dict[str, Any] = {n: getattr(module, n, None) for n in NEW_HEADS}
        for name, part in _added(module).items():
            if not _may_be_pretrained(part, module):
                heads[name] = part
        for name, head in heads.items():
            if isinstance(head, (nn.Module, nn.Parameter)):
                found[f"{path}.{name}".lstrip(".")] = head
    return found


def uncertain_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules that a user's class adds to a model and may have loaded.

    They are of transformers' classes, or compute the logits of a language model.
    """
    found = {}
    for path, module in model.named_modules():
        added = _added(module) if isinstance(module, PreTrainedModel) else {}
        if not any(isinstance(part, PreTrainedModel) for part in added.values()):
            continue  # all of it may be the pre-trained model
        for name, part in added.items():
            has_model = any(isinstance(m, PreTrainedModel) for m in _modules(part))
            if isinstance(part, nn.Parameter) or has_model:
                continue
            if _may_be_pretrained(part, module):
                found[f"{path}.{name}".lstrip(".")] = part
    return found


def _added(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Return attributes of a user's class that transformers' classes do not assign."""
    kinds = [k for k in type(model).__mro__ if k.__module__.startswith("transformers.")]
    if not kinds or kinds[0] is type(model):
        return {}
    starts = [inspect.unwrap(k.__dict__.get("__init__", _nothing)) for k in kinds]
    theirs = {name for start in starts for name in start.__code__.co_names}
    own = dict(model.named_children()) | dict(model.named_parameters(recurse=False))
    return {name: part for name, part in own.items() if name not in theirs}


def _nothing() -> None:
    """Replace the `__init__` of a class that defines none."""


def _modules(part: nn.Module | nn.Parameter) -> list[nn.Module]:
    return list(part.modules()) if isinstance(part, nn.Module) else []


def _may_be_pretrained(part: nn.Module | nn.Parameter, model: nn.Module) -> bool:
    """Return whether transformers may load weights into `part`."""
    if isinstance(model, PreTrainedModel) and part is model.get_output_embeddings():
        return True
    kinds = [kind for module in _modules(part) for kind in type(module).__mro__]
    return any(kind.__module__.startswith("transformers.models.") for kind in kinds)


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


def _refuse_compiled(model: nn.Module, families: dict[type[nn.Module], Family]) -> None:
    for module in model.modules():
        plain = getattr(module, "_orig_mod", None)  # set by `torch.compile`
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
