"""Values of small tensors of the GPU that follow from integers of the host.

Lengths, masks, token ids and the sizes of images are integers that a program makes on
the host, where they have values, and moves to the GPU. What it computes from them, and
from constants, decides shapes: the positions of image tokens, the pieces of a batch,
how many tokens are not padding. The values of such tensors are kept on the host, next
to the fake tensors, and operators of them alone run on the host as well. All else has
no values.
"""

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten
MOST_ELEMENTS = 2**16
"""Number of elements above which the values of a tensor are not kept.

It bounds the time on the host; token ids of a batch are below it, matrices above.
"""
DEPEND_ON_VALUES = frozenset(
    {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
)
CONSTANTS = frozenset({aten.zeros, aten.ones, aten.full, aten.scalar_tensor})
"""Operators that make tensors of one value, as the default mask of a model."""
LIKE = frozenset(
    {
        *(aten.zeros_like, aten.ones_like, aten.full_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full),
    }
)
"""Operators that take no more than a shape and a dtype from their first argument."""
UNINITIALISED = frozenset(
    {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.resize_}
)
"""Operators whose results have no values yet, or not all of them."""
TO_HOST = aten._to_copy.default
UNKNOWN = object()
"""Represents a result that does not follow from known values."""


class KnownValues:
    """The values of fake tensors on a device, where they are known.

    Args:
        device: type of the device.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device, 0) if device == "cuda" else device
        # By identity, as tensors compare element by element.
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}
        """A reference to each tensor, its values, and its storage."""

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the values of a tensor as a tensor of the host, None if unknown."""
        if type(tensor) is not FakeTensor:
            return tensor if tensor.device.type == "cpu" else None
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        # `data =` and `swap_tensors` put other memory behind a tensor.
        is_same = known[2] == tensor.untyped_storage()._cdata
        return known[1] if is_same and known[1].shape == tensor.shape else None

    def answer(
        self,
        mode: FakeTensorMode,
        func: OpOverload,
        args: Any,
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return what an operator makes if only values tell; `UNKNOWN` otherwise.

        A copy to the host has values there.

        Args:
            mode: the mode to which fake tensors belong.
            func: the operator.
            args: its positional arguments.
            kwargs: its other arguments.
        """
        if not self._known:
            return UNKNOWN
        is_to_host = func is TO_HOST and _is_to_host(kwargs)
        if not is_to_host and not _needs_values(func):
            return UNKNOWN
        values = self._on_host(func, args, kwargs)
        if is_to_host:
            is_whole = values is not UNKNOWN and _is_whole(values.dtype)
            return values if is_whole else UNKNOWN
        with mode:
            if isinstance(values, tuple):
                return tuple([self._on_device(one) for one in values])
            return self._on_device(values)

    def note(
        self, func: OpOverload, args: Any, kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Note the values of what an operator has made, or has written.

        Args:
            func: the operator.
            args: its positional arguments.
            kwargs: its other arguments.
            out: its result.
        """
        first = args[0] if args else None
        if type(first) is FakeTensor and id(first) not in self._known:
            # The usual case, in which values neither come in nor are known.
            if func._overloadpacket in LIKE and _is_whole(out.dtype):
                if out.numel() > MOST_ELEMENTS:
                    return
                like = torch.empty((), dtype=first.dtype).expand(first.shape)
                args = (like, *args[1:])
            elif not _writes(func):
                return
        elif not self._begins(func, args, kwargs):
            return
        outs = out if isinstance(out, tuple | list) else [out]
        size = sum(one.numel() for one in outs if isinstance(one, Tensor))
        values = self._on_host(func, args, kwargs) if size <= MOST_ELEMENTS else UNKNOWN
        if values is UNKNOWN:
            for place, name in _writes(func):
                self._forget(args[place] if place < len(args) else kwargs.get(name))
            return
        all_values = values if isinstance(values, tuple | list) else [values]
        for one, value in zip(outs, all_values, strict=True):
            self._keep(one, value)

    def _begins(self, func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> bool:
        """Return whether an operator may make values from these arguments."""
        first = args[0] if args else None
        if type(first) is FakeTensor:
            return True
        if isinstance(first, Tensor):
            is_of_host = first.device.type == "cpu"
            return is_of_host and _is_whole(first.dtype)
        if func._overloadpacket in CONSTANTS:
            return True
        if func._overloadpacket is aten.arange:
            dtype = kwargs.get("dtype")
            return dtype is None or _is_whole(dtype)
        return isinstance(first, tuple | list) and isinstance(
            next(iter(first), 0), Tensor
        )

    def _on_host(self, func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an operator on the values of its arguments; `UNKNOWN` if it has none."""
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random or func._overloadpacket in UNINITIALISED:
            return UNKNOWN
        values = self._values_of(args)
        if values is UNKNOWN:
            return UNKNOWN
        named: dict[str, Any] = {}
        for name, value in kwargs.items():
            named[name] = "cpu" if name == "device" else self._values_of(value)
            if named[name] is UNKNOWN:
                return UNKNOWN
        try:
            return func(*values, **named)
        except (RuntimeError, IndexError, NotImplementedError):
            return UNKNOWN  # no kernel for the host, or what fails on a GPU as well

    def _values_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self.of(value)
            return UNKNOWN if known is None else known
        if isinstance(value, tuple | list):
            found = [self._values_of(one) for one in value]
            return UNKNOWN if any(one is UNKNOWN for one in found) else found
        return value

    def _on_device(self, values: Any) -> Any:
        """Return a new fake tensor with known values."""
        if not isinstance(values, Tensor):
            return values  # a number, or `UNKNOWN`
        made = torch.empty_strided(
            values.shape, values.stride(), dtype=values.dtype, device=self._device
        )
        self._keep(made, values)
        return made

    def _keep(self, tensor: Any, values: Any) -> None:
        if type(tensor) is not FakeTensor or not isinstance(values, Tensor):
            return
        if tensor.shape == values.shape and tensor.dtype == values.dtype:
            key = id(tensor)
            watch: weakref.ref[Tensor] = weakref.ref(
                tensor, lambda _: self._known.pop(key, None)
            )
            self._known[key] = (watch, values, tensor.untyped_storage()._cdata)

    def _forget(self, written: Any) -> None:
        """Forget the values of what is overwritten, and of all its views."""
        if isinstance(written, tuple | list):
            for one in written:
                self._forget(one)
        elif type(written) is FakeTensor:
            memory = written.untyped_storage()._cdata
            for key, (_, _, other) in [*self._known.items()]:
                if other == memory:
                    del self._known[key]


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


@functools.cache
def _needs_values(func: OpOverload) -> bool:
    return bool(DEPEND_ON_VALUES & set(func.tags)) or func is aten.equal.default


@functools.cache
def _writes(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return the places and names of the arguments that an operator overwrites."""
    return tuple(
        (place, one.name)
        for place, one in enumerate(func._schema.arguments)
        if one.alias_info is not None and one.alias_info.is_write
    )


def _is_to_host(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"
