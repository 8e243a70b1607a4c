"""The function of a cell's method: one of ours, a config of PEFT, or a user's own.

    NAME                      one of the table of methods
    peft:TYPE, peft:FILE      a config of PEFT
    python:MODULE:FUNCTION    a function of the user, `method(model, cell) -> model`

The first needs a model of a known family, but for the methods of
`METHODS_OF_ANY_MODEL`, which take a model of any.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from meft_bench.child.backbones import any_family
from meft_bench.child.methods import any_checkpointing
from meft_bench.child.own import code
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import PYTHON
from meft_bench.shared.registry import METHODS, PEFT, load

Method = Callable[[Any, Cell], Any]


def function_of(cell: Cell, config: PreTrainedConfig) -> Method:
    """Return the function of a cell's method.

    Args:
        cell: the cell, which names the method.
        config: config of the model.

    Raises:
        ValueError: the method needs a family, and that of the model is not known; or a
            function of the user cannot be loaded.
    """
    if any_family.is_known(config) and cell.method in METHODS:
        method: Method = load(METHODS[cell.method])
        return method
    any_family.require(cell, config)
    return any_function_of(cell)


def any_function_of(cell: Cell) -> Method:
    """Return the function of a method that needs no family."""
    if cell.method.startswith(PEFT):
        from meft_bench.child.methods import peft_config  # peft takes seconds

        return peft_config.apply
    if cell.method.startswith(PYTHON):
        return _checked(code.load(cell.method, "method"))
    return _of_any_family


def _of_any_family(model: Any, cell: Cell) -> Any:
    """Apply one of `METHODS_OF_ANY_MODEL` to a model of a family that is not known."""
    if cell.method == "head":
        return _head(model, cell)
    if cell.method.startswith("lora"):
        from meft_bench.child.methods import peft_config

        model = peft_config.lora(model, cell)
    if any_checkpointing.is_checkpointed(cell):
        is_offload = cell.method.endswith("-offload")
        any_checkpointing.checkpoint(model, offload=is_offload)
    return model


def _head(model: Any, cell: Cell) -> Any:
    heads = any_family.heads_of(model)
    if model.config.problem_type is None or not heads:
        raise ValueError(
            f"method 'head' trains a new head, and for task {cell.task!r} a model "
            "keeps the one it has: take another method, or a task of labels"
        )
    model.requires_grad_(False)
    for head in heads.values():
        head.requires_grad_(True)
    return model


def _checked(function: Any) -> Method:
    """Return a function of the user, whose result is checked."""

    def apply(model: Any, cell: Cell) -> Any:
        made = function(model, cell)
        if not isinstance(made, nn.Module):
            raise ValueError(
                f"method {cell.method!r} returned {type(made).__name__}, expected the "
                "model: end the function with `return model`"
            )
        if not hasattr(made, "config"):
            raise ValueError(
                f"method {cell.method!r} returned a {type(made).__name__} without "
                "`config`: return transformers' model, or PEFT's around it"
            )
        if not any(parameter.requires_grad for parameter in made.parameters()):
            raise ValueError(
                f"method {cell.method!r} returned a model of which nothing is trained: "
                "call `requires_grad_(True)` on what should be"
            )
        return made

    return apply
