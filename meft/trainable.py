"""Selection of the trainable parameters of a converted model.

A conversion makes its adapters and newly made task heads trainable and freezes
everything else. If some parameters were frozen before the conversion and others were
not, the user has chosen what to train, manually or with peft, and that choice is kept.

Other libraries freeze parameters as well: peft's `get_peft_model` freezes all
parameters that peft has not added itself. `warn_if_frozen` detects adapters that were
frozen in this way.
"""

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from meft.backbone.heads import (
    backbone_parameters,
    freeze_all_but_head,
    new_heads,
    uncertain_heads,
)
from meft.errors import FrozenWarning

PEFT_LAST = (
    "Call peft first and meft last, `{converter}(get_peft_model(model, peft_config), "
    "config)`: then both train and both are saved. In the present order, set "
    "`requires_grad` of the parameters with {names!r} in their names, and save with "
    "`meft.save_adapters(model, directory)`"
)


def choose_trainable(model: nn.Module) -> None:
    """Freeze the backbone, unless the user has chosen what to train.

    Args:
        model: a model before its conversion. If it has adapters of the other method,
            these do not change.

    Warns:
        FrozenWarning: the choice has frozen a task head, or it is unknown whether a
            module that a user's class adds is pre-trained.
    """
    if not _is_chosen(model):
        freeze_all_but_head(model)
        for name, module in uncertain_heads(model).items():
            warnings.warn(
                f"`{name}` is frozen: it is a {type(module).__name__} of transformers, "
                "which may have pre-trained weights. Call "
                f"`model.{name}.requires_grad_(True)` after the conversion to train it",
                FrozenWarning,
                stacklevel=4,
            )
        return
    for name, head in new_heads(model).items():
        flags = [head] if isinstance(head, nn.Parameter) else list(head.parameters())
        if flags and not any(parameter.requires_grad for parameter in flags):
            last = name.rpartition(".")[2]
            warnings.warn(
                f"the task head `{name}` is frozen, as it was before the conversion, "
                f"and will not be trained. Call `model.{name}.requires_grad_(True)` "
                f"to train it; with peft, pass `modules_to_save=[{last!r}]`",
                FrozenWarning,
                stacklevel=4,
            )


def has_peft_layers(module: nn.Module) -> bool:
    """Return whether peft has added a layer of its own to `module`."""
    return any(type(m).__module__.startswith("peft.") for m in module.modules())


def warn_if_frozen(
    parameters: Iterable[Tensor], converter: str, names: str, peft_came_last: bool
) -> bool:
    """Warn if adapters would be excluded from training.

    Args:
        parameters: weights of the adapters.
        converter: the function that added them, by its public name.
        names: the part that the names of these parameters have in common.
        peft_came_last: whether peft was applied after `converter`.

    Returns:
        Whether a warning was issued.

    Warns:
        FrozenWarning: all of `parameters` are frozen, or `peft_came_last`.
    """
    flags = {parameter.requires_grad for parameter in parameters}
    is_frozen = flags == {False}
    advice = PEFT_LAST.format(converter=converter, names=names)
    if peft_came_last:
        state = "froze the adapters" if is_frozen else "has frozen the adapters once"
        text = (
            f"peft was applied after `{converter}`: it {state}, and `save_pretrained` "
            f"and `load_adapter` of a PeftModel leave them out. {advice}"
        )
    elif is_frozen:
        text = (
            f"the adapters of `{converter}` are frozen and will not be trained. Ignore "
            "this if you have frozen them yourself. peft (`get_peft_model`, "
            "`add_adapter`, `prepare_model_for_kbit_training`) freezes everything that "
            f"it has not added. {advice}"
        )
    else:
        return False
    warnings.warn(text, FrozenWarning, stacklevel=2)
    return True


def _is_chosen(model: nn.Module) -> bool:
    if has_peft_layers(model):
        return True
    # Quantised weights cannot be trained, so their being frozen is not a user's choice.
    flags = {
        parameter.requires_grad
        for parameter in backbone_parameters(model)
        if parameter.is_floating_point() and type(parameter) is nn.Parameter
    }
    return len(flags) == 2
