"""Remember what operators make of tensors of the same shapes.

A model repeats its blocks, and a plan repeats its steps, so that nearly every operator
has run before with tensors of the same shapes, strides and dtypes. What it makes is
known then: the memo makes fake tensors of the same description, without asking torch,
which takes most of the time of a step.

Only operators are remembered whose results follow from such descriptions, and which
change no argument, or the values of the first only. A result is a new tensor, a view of
the first argument, or that argument.
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
KINDS_OF_RESULTS = frozenset({"Tensor", "int"})
INDEX = torch.ops.aten.index.Tensor
"""Its result depends on values if an index is a mask, and on shapes otherwise."""
aten = torch.ops.aten
OTHERS = frozenset({aten.set_, aten.resize_, aten.resize_as_, aten.as_strided})
"""Operators for which storages matter, which descriptions do not have."""
ASSUMED: frozenset[OpOverload] = frozenset()
"""Operators whose sizes depend on values in general, but are assumed from shapes."""
MASKS = frozenset({torch.bool, torch.uint8})
FIRST = object()
"""Remembered of an operator that changes values of its first argument and returns it.
"""
REAL = object()
"""Begins the part of a key for a real tensor; there are some on the host."""
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


Result = Made | int | None
"""What is remembered of a result: numbers, such as lengths, are kept."""


class Memo:
    """Results of operators by operator and descriptions of arguments."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        """The attributes of a new fake tensor, by its device."""
        self._kinds: dict[OpOverload, object] = {}
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
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if not kind:
            return plain()
        key = self._key(func, args, kwargs)
        if key is None:
            return plain()
        made = self._made.get(key)
        if made is None:
            out = plain()
            if kind is FIRST:
                if out is args[0] and self._key(func, args, kwargs) == key:
                    self._made[key] = FIRST
                return out
            described = self._described(args, kwargs, out)
            if described is not None:
                self._made[key] = described
            return out
        self.num_hits += 1
        if made is FIRST:
            return args[0]
        if isinstance(made, tuple):
            return tuple([self._make(mode, one, args) for one in made])
        return self._make(mode, made, args)

    def _key(self, func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return what the result depends on; None if that is not remembered."""
        if func is INDEX and INDEX not in ASSUMED and _has_mask(args[1]):
            return None
        parts: list[Any] = [
            func,
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),
        ]
        is_in_place = self._kinds.get(func) is FIRST
        for value in args:
            part = self._part(value, is_in_place)
            if part is UNKNOWN:
                return None
            parts.append(part)
        for name, value in kwargs.items():
            part = self._part(value, is_in_place)
            if part is UNKNOWN:
                return None
            parts.append((name, part))
        return tuple(parts)

    def _part(self, value: Any, is_in_place: bool = False) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            if (
                value.constant is not None
                or value.layout is not torch.strided
                or value.is_conj()
                or value.is_neg()
            ):
                return UNKNOWN
            offset = value.storage_offset()
            return (
                value.shape,
                value.stride(),
                value.dtype,
                value.fake_device,
                offset,
            )
        if kind in PLAIN:
            return (kind, value)
        if kind is Tensor and value.layout is torch.strided:
            # Next to fake tensors, values of real ones do not matter; whether one of no
            # dimension is a number of Python, which decides dtypes, is not known here.
            if not value.dim() and not is_in_place:
                return UNKNOWN
            offset = value.storage_offset()
            return (REAL, value.shape, value.stride(), value.dtype, offset)
        if kind is list or kind is tuple:
            parts = tuple([self._part(one, is_in_place) for one in value])
            return UNKNOWN if UNKNOWN in parts else parts
        return value if isinstance(value, HASHABLE) else UNKNOWN

    def _described(
        self, args: Any, kwargs: Mapping[str, Any], out: Any
    ) -> Result | tuple[Result, ...]:
        """Return the description of a result; None if it cannot be made anew."""
        results = out if isinstance(out, tuple) else (out,)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        taken = {_storage(t) for t in _tensors((*args, *kwargs.values()))}
        found: list[Result] = []
        for one in results:
            if one is None or type(one) is int:
                found.append(one)
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

    def _make(self, mode: FakeTensorMode, made: Result, args: Any) -> Any:
        """Return a new tensor of a description; a number, or None, as it is."""
        if not isinstance(made, Made):
            return made
        if made.offset is None:
            meta = torch.empty_strided(
                made.shape, made.stride, dtype=made.dtype, device="meta"
            )
        else:
            storage = args[0].untyped_storage()
            meta = torch.empty(0, dtype=made.dtype, device="meta")
            meta.set_(storage, made.offset, made.shape, made.stride)
        attributes = self._attributes.get(made.device)
        if attributes is None:
            tensor = FakeTensor(mode, meta, made.device)
            self._attributes[made.device] = dict(vars(tensor))
            return tensor
        # What the constructor does, which checks its arguments and sets the attributes
        # one by one: a fifth of the time of a step.
        tensor = Tensor._make_subclass(
            FakeTensor,
            meta,
            dispatch_device=True,
            device_for_backend_keys=made.device,
        )
        if mode._allow_unsafe_data_ptr_access:
            torch._C._set_warn_deprecated_on_mutable_data_ptr(tensor)
        else:
            torch._C._set_throw_on_mutable_data_ptr(tensor)
        vars(tensor).update(attributes)
        return tensor


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor is all of its storage."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * step for size, step in sizes)
    num_elements = 0 if tensor.numel() == 0 else last + 1
    num_bytes = num_elements * tensor.element_size()
    is_at_start = tensor.storage_offset() == 0
    return is_at_start and tensor.untyped_storage().nbytes() == num_bytes


def _kind(func: OpOverload) -> object:
    """Return whether an operator is remembered; `FIRST` if it changes an argument.

    It then changes the first only and returns it, as `add_` does. Others change none,
    and return tensors and numbers.
    """
    schema = func._schema
    if func.namespace != "aten" or not schema.returns or func._overloadpacket in OTHERS:
        return False
    depends_on_values = not DEPEND_ON_VALUES.isdisjoint(func.tags)
    if depends_on_values and func is not INDEX and func not in ASSUMED:
        return False
    first, *others = [_is_written(one) for one in schema.arguments] or [False]
    returned = [_is_written(one) for one in schema.returns]
    if any(others):
        return False
    if first:
        return FIRST if returned == [True] else False
    kinds = {str(one.type) for one in schema.returns}
    return not any(returned) and kinds <= KINDS_OF_RESULTS


def _has_mask(indices: Any) -> bool:
    return any(tensor.dtype in MASKS for tensor in _tensors(indices))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


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
