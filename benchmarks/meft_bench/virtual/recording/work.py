"""The amount of work of an operator: operations, and bytes read and written."""

import functools
from collections.abc import Iterator, Sequence
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


UNREAD = {
    aten._pin_memory,
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.is_pinned,
    aten.new_empty,
    aten.new_empty_strided,
}
"""Operators that reserve memory or ask about it, and do not read or write it."""
LIKE = {
    aten.full_like,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.zeros_like,
}
"""Operators that write a result of the form of their first tensor, and read none."""
OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}
"""Operators that write their first tensor and do not read it."""
GATHER = {
    aten.embedding,
    aten.gather,
    aten.index,
    aten.index_select,
    aten.nll_loss_forward,
}
"""Operators that read a part of their first tensor, at least as large as the result."""
SCATTER = {
    aten._index_put_impl_: 2,
    aten.index_add_: 2,
    aten.index_copy_: 1,
    aten.index_fill_: 1,
    aten.index_put_: 1,
    aten.scatter_: 1,
    aten.scatter_add_: 2,
}
"""Operators that change a part of their first tensor, and how often they pass over it.

The part has at least as many numbers as the last tensor that is given.
"""


def traffic(
    func: Any, made: Sequence[Tensor], given: Sequence[Tensor]
) -> Iterator[tuple[Tensor, int]]:
    """Yield each tensor of an operator with the bytes of it that are read or written.

    Args:
        func: the operator.
        made: its results.
        given: the tensors among its arguments.
    """
    name = func._overloadpacket
    if name in UNREAD:
        return
    whole = [*made, *given]
    if name in GATHER and made and given:
        table, *others = given
        yield table, _part(made[0], table)
        # A result may be in memory that was given for it.
        whole = [made[0], *(tensor for tensor in others if tensor is not made[0])]
    elif name is aten.nll_loss_backward:
        whole = [*made, given[0], *given[2:]]  # without the values of which it is
    elif name in LIKE:
        whole = [*made]
    elif name in OVERWRITE:
        whole = [*given]
    elif name in SCATTER and len(given) > 1:
        table, *whole = given
        part = whole[-1].numel() * table.element_size()
        yield table, min(SCATTER[name] * part, _size(table))
    yield from ((tensor, _size(tensor)) for tensor in whole)


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; numbers that are expanded are read once."""
    numel = tensor.numel()
    if numel and tensor.layout is torch.strided:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride == 0:
                numel //= size
    return numel * tensor.element_size()


def _part(made: Tensor, table: Tensor) -> int:
    """Return the bytes of a table from which a result is made."""
    return min(made.numel() * table.element_size(), _size(table))


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
