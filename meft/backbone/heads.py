"""Task heads without pre-trained weights, which must be trained.

Heads of transformers' classes are known by name (`Family.new_heads`); those of a user's
class are what it adds to transformers' class.
"""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from meft.backbone.families import FAMILIES
from meft.backbone.parallel import NAME

NEW_HEADS = tuple(
    dict.fromkeys(name for family in FAMILIES for name in family.new_heads)
)
"""Names of the heads of all families, each once."""


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
