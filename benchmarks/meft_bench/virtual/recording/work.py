"""The amount of work of an operator: operations, and bytes read and written."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention: 0,
    aten._scaled_dot_product_efficient_attention: 0,
    aten._scaled_dot_product_cudnn_attention: 0,
    aten._scaled_dot_product_flash_attention_backward: 1,
    aten._scaled_dot_product_efficient_attention_backward: 1,
    aten._scaled_dot_product_cudnn_attention_backward: 1,
}
"""Attention kernels, and the index of the query among their arguments.

The key and the value follow the query.
"""


PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
"""Matrix products, whose operations follow from the shapes of their tensors."""


def num_flops(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> int:
    """Return the floating-point operations of a matrix product or of attention.

    Args:
        func: the operator.
        args: its positional arguments.
        kwargs: its other arguments.
        out: its result.

    Returns:
        The number of operations; 0 for any other operator.
    """
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    if func._overloadpacket in PRODUCTS:
        # Overloads with a dtype or an output have arguments that the formula lacks.
        shapes = tuple(a.shape for a in args if isinstance(a, Tensor))
        return _of_product(func._overloadpacket, shapes)
    return int(formula(*_all_heads(func, args), **kwargs, out_val=out))


@functools.cache  # a model repeats its products
def _of_product(product: Any, shapes: tuple[torch.Size, ...]) -> int:
    """Return the operations of a product of tensors of some shapes."""
    return int(flop_registry[product](*shapes))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, which an operator reads or writes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _all_heads(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return attention's arguments with as many key and value heads as query heads.

    The formulas of PyTorch before 2.13 do not support heads that queries share.
    """
    first = ATTENTION.get(func._overloadpacket)
    if first is None:
        return args
    heads = args[first].shape[1]
    shapes = [
        torch.Size((t.shape[0], heads, *t.shape[2:])) for t in args[first : first + 3]
    ]
    return (*args[:first], *shapes, *args[first + 3 :])
