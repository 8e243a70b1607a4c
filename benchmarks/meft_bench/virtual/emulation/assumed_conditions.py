"""Conditions that Python reads, of which most are assumed to be true.

`isnan` and `isinf` are false, as in training that goes well, and so is what follows
from them by `any`, `all`, `logical_or` and the like. The negation of a condition is
true as well, as code asks for either.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FALSE = frozenset({aten.isnan, aten.isinf, aten.isposinf, aten.isneginf})
"""Operators whose results are false."""
KEPT = frozenset(
    {
        *(aten.any, aten.all, aten.max, aten.amax, aten.min, aten.amin, aten.clone),
        *(aten.detach, aten.view, aten.reshape, aten._to_copy, aten.select),
        *(aten.squeeze, aten.unsqueeze, aten.slice, aten.expand, aten.alias),
    }
)
"""Operators whose results are as true as their first argument."""
EITHER = frozenset({aten.logical_or, aten.bitwise_or})


class Conditions:
    """Which boolean tensors are false; all others are true."""

    def __init__(self) -> None:
        self.num_read = 0
        """Number of conditions that Python has read."""
        # By identity, as tensors compare element by element.
        self._false: dict[int, weakref.ref[Tensor]] = {}

    def note(self, func: Any, args: Any, out: Any) -> None:
        """Note the result of an operator.

        Args:
            func: the operator.
            args: its arguments.
            out: its result.
        """
        packet = func._overloadpacket
        if not isinstance(out, Tensor) or out.dtype is not torch.bool:
            return
        if packet in FALSE:
            is_false = True
        elif packet in KEPT:
            is_false = self._is_false(args[0])
        elif packet in EITHER:
            is_false = all(map(self._is_false, args[:2]))
        else:
            return
        if is_false:
            key = id(out)
            self._false[key] = weakref.ref(out, lambda _: self._false.pop(key, None))

    def _is_false(self, tensor: Any) -> bool:
        known = self._false.get(id(tensor))
        return known is not None and known() is tensor

    def read(self, tensor: Tensor) -> bool:
        """Return the value of a condition that Python reads."""
        self.num_read += 1
        return not self._is_false(tensor)
