"""Which parameters of a converted model are trained.

A conversion makes its adapters and newly made task heads trainable and freezes
everything else. If some parameters were frozen before the conversion and others were
not, somebody has chosen what to train, by hand or with peft, and that choice is kept.

Other libraries freeze parameters as well: peft's `get_peft_model` freezes all that peft
has not made itself. `warn_if_frozen` finds adapters that were frozen in this way.
"""

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from meft.backbone.families import (
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
    """Freeze the backbone, unless the model comes with a choice of what to train.

    Args:
        model: a model before its conversion. Adapters of the other method, if it has
            them, stay as they are.

    Warns:
        FrozenWarning: the choice has frozen a task head; or it cannot be known whether
            a module that a class of the user's adds is pre-trained.
    """
    if not _is_chosen(model):
        freeze_all_but_head(model)
        for name, module in uncertain_heads(model).items():
            warnings.warn(
                f"`{name}` is frozen: it is a {type(module).__name__} of transformers, "
                "which may have pre-trained weights. Call "
                f"`model.{name}.requires_grad_(True)` after the conversion to train it",
                FrozenWarning,
                stacklevel=3,
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
                stacklevel=3,
            )


def has_peft_layers(module: nn.Module) -> bool:
    """Whether peft has put a layer of its own into `module`."""
    return any(type(m).__module__.startswith("peft.") for m in module.modules())


def warn_if_frozen(
    parameters: Iterable[Tensor], converter: str, names: str, peft_came_last: bool
) -> bool:
    """Warn if adapters are about to be left out of a training.

    Args:
        parameters: weights of the adapters.
        converter: the function that made them, as users call it.
        names: what the names of these parameters have in common.
        peft_came_last: peft was applied after `converter`.

    Returns:
        Whether there was something to warn of.

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
    # Quantised weights cannot be trained, so that nobody has chosen to freeze them.
    flags = {
        parameter.requires_grad
        for parameter in backbone_parameters(model)
        if parameter.is_floating_point() and type(parameter) is nn.Parameter
    }
    return len(flags) == 2
