"""Requests for outputs of single blocks, refused where a model is called.

A stack refuses those among its own arguments. Not all reach it: GPT-2 removes them
before its loop, MPNet and Falcon collect hidden states in the loop, and Mixtral uses
hooks to collect what its routers compute. So the call of every model around a stack is
examined as well; without one, that of the module that has the loop.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from meft.backbone.find import refuse_layerdrop
from meft.errors import UnsupportedCallError
from meft.reversible.call_arguments import refuse_outputs
from meft.reversible.stand_ins import HiddenBetween


def watch(model: nn.Module, owner: nn.Module) -> None:
    """Examine the calls of the models around a stack from now on.

    A `layerdrop` that is set later is refused too.

    Args:
        model: the model that is converted.
        owner: the module in it that loops over the stack.
    """
    around = [m for m in model.modules() if any(p is owner for p in m.modules())]
    models = [m for m in around if isinstance(m, PreTrainedModel)]
    # DeBERTa asks its encoder for hidden states in every call.
    outer: list[nn.Module] = [*models] or [owner]
    for module in outer:
        if _refuse_requests not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refuse_requests, with_kwargs=True)
    if hasattr(owner, "layerdrop"):
        owner.register_forward_pre_hook(refuse_layerdrop)
    owner.register_forward_hook(_refuse_unfinished)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (_refuse_requests, refuse_layerdrop):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, found in list(module._forward_hooks.items()):
            if found is _refuse_unfinished:
                del module._forward_hooks[key]


def _refuse_unfinished(module: nn.Module, args: Any, output: Any) -> None:
    """Refuse hidden states between blocks in an output; a forward hook.

    Raises:
        UnsupportedCallError: the loop of the module has ended before the last block.
    """
    if torch.compiler.is_compiling():
        return
    values = output.values() if isinstance(output, dict) else output
    for value in values if isinstance(output, dict | tuple) else (output,):
        if isinstance(value, HiddenBetween):
            raise UnsupportedCallError(
                f"the loop of a {type(module).__name__} ended before the last block of "
                "its reversible stack (did `num_hidden_layers` of the config change?), "
                "which runs as one. To use fewer blocks, change the list before "
                "`meft.make_reversible`"
            )


def _refuse_requests(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse requests in a call or in the config of the model; a forward pre-hook.

    Raises:
        UnsupportedCallError: there is one.
    """
    refuse_outputs(dict(kwargs), getattr(module, "config", None))
