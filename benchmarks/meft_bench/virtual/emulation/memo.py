"""Remember what operators make of tensors of the same shapes.

A model repeats its blocks, and a plan repeats its steps, so that nearly every operator
has run before with tensors of the same shapes, strides and dtypes. What it makes is
known then: the memo makes fake tensors of the same description, without asking torch,
which takes most of the time of a step.

Only operators are remembered whose results follow from such descriptions: they change
no argument, return tensors, and have all of them on the GPU. A result is a new tensor,
or a view of the first argument.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN = frozenset({bool, int, float, str, type(None)})
HASHABLE = (torch.dtype, torch.device, torch.layout, torch.memory_format)
DEPEND_ON_VALUES = frozenset(
    {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
)
UNKNOWN = object()
"""The part of a key for a value that is not remembered."""


@dataclass(frozen=True, slots=True)
class Made:
    """Description of a tensor that an operator makes.

    Attributes:
        shape: its shape.
        stride: its strides.
        dtype: its dtype.
        device: its device.
        offset: of a view, where it begins in the storage of the first argument; None
            for a tensor with a storage of its own.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None


class Memo:
    """Results of operators by operator and descriptions of arguments.

    Args:
        device: type of the device of the GPU's tensors.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._made: dict[Any, Made | tuple[Made | None, ...]] = {}
        self._is_pure: dict[OpOverload, bool] = {}
        self.num_hits = 0
        """Number of results that were known."""

    def run(
        self,
        mode: FakeTensorMode,
        func: OpOverload,
        args: Any,
        kwargs: Mapping[str, Any],
        plain: Callable[[], Any],
    ) -> Any:
        """Return what an operator makes, which `plain` finds out if it is not known.

        Args:
            mode: the mode to which fake tensors belong.
            func: the operator.
            args: its positional arguments.
            kwargs: its other arguments.
            plain: runs the operator.
        """
        is_pure = self._is_pure.get(func)
        if is_pure is None:
            is_pure = self._is_pure[func] = _is_pure(func)
        if not is_pure:
            return plain()
        key = self._key(func, args, kwargs)
        if key is None:
            return plain()
        made = self._made.get(key)
        if made is None:
            out = plain()
            described = self._described(args, kwargs, out)
            if described is not None:
                self._made[key] = described
            return out
        self.num_hits += 1
        if isinstance(made, Made):
            return _make(mode, made, args)
        return tuple([None if one is None else _make(mode, one, args) for one in made])

    def _key(self, func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return what the result depends on; None if that is not remembered."""
        parts: list[Any] = [
            func,
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),
        ]
        for value in args:
            part = self._part(value)
            if part is UNKNOWN:
                return None
            parts.append(part)
        for name, value in kwargs.items():
            part = self._part(value)
            if part is UNKNOWN:
                return None
            parts.append((name, part))
        return tuple(parts)

    def _part(self, value: Any) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            if (
                value.fake_device.type != self._device
                or value.constant is not None
                or value.layout is not torch.strided
                or value.is_conj()
                or value.is_neg()
            ):
                return UNKNOWN
            offset = value.storage_offset()
            return (tuple(value.shape), value.stride(), value.dtype, offset)
        if kind in PLAIN:
            return (kind, value)
        if kind is list or kind is tuple:
            parts = tuple([self._part(one) for one in value])
            return UNKNOWN if UNKNOWN in parts else parts
        return value if isinstance(value, HASHABLE) else UNKNOWN

    def _described(
        self, args: Any, kwargs: Mapping[str, Any], out: Any
    ) -> Made | tuple[Made | None, ...] | None:
        """Return the description of a result; None if it cannot be made anew."""
        results = out if isinstance(out, tuple) else (out,)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        taken = {_storage(t) for t in _tensors((*args, *kwargs.values()))}
        found: list[Made | None] = []
        for one in results:
            if one is None:
                found.append(None)
                continue
            if type(one) is not FakeTensor or self._part(one) is UNKNOWN:
                return None
            is_view = first is not None and _storage(one) == _storage(first)
            if not is_view:
                if _storage(one) in taken or not _is_whole(one):
                    return None
                taken.add(_storage(one))
            found.append(
                Made(
                    tuple(one.shape),
                    one.stride(),
                    one.dtype,
                    one.fake_device,
                    int(one.storage_offset()) if is_view else None,
                )
            )
        return tuple(found) if isinstance(out, tuple) else found[0]


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor is all of its storage."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * step for size, step in sizes)
    num_elements = 0 if tensor.numel() == 0 else last + 1
    num_bytes = num_elements * tensor.element_size()
    is_at_start = tensor.storage_offset() == 0
    return is_at_start and tensor.untyped_storage().nbytes() == num_bytes


def _is_pure(func: OpOverload) -> bool:
    """Return whether an operator changes no argument, and returns tensors only."""
    schema = func._schema
    writes = [
        one.alias_info is not None and one.alias_info.is_write
        for one in (*schema.arguments, *schema.returns)
    ]
    return (
        func.namespace == "aten"
        and bool(schema.returns)
        and not any(writes)
        and {str(one.type) for one in schema.returns} == {"Tensor"}
        and not DEPEND_ON_VALUES & set(func.tags)
    )


def _make(mode: FakeTensorMode, made: Made, args: Any) -> FakeTensor:
    if made.offset is None:
        meta = torch.empty_strided(
            made.shape, made.stride, dtype=made.dtype, device="meta"
        )
    else:
        storage = args[0].untyped_storage()
        meta = torch.empty(0, dtype=made.dtype, device="meta")
        meta.set_(storage, made.offset, made.shape, made.stride)
    return FakeTensor(mode, meta, made.device)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
