"""Properties of the tensors of an operator, fake or real."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Any) -> bool:
    """Return whether it has no data."""
    return isinstance(tensor, FakeTensor)


def device_of(tensor: Tensor) -> str:
    """Return the type of its device; a fake tensor's is the emulated one."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type


PARTS = {"DTensor": "_local_tensor", "AsyncCollectiveTensor": "elem"}
"""Classes of distributed tensors, and their attribute with what this process holds.

They are wrappers without memory of their own; they are named, as not to import them.
"""


def is_distributed(kind: type) -> bool:
    """Return whether a class of tensors is a wrapper of what this process holds."""
    return kind.__name__ in PARTS


def local(tensor: Tensor) -> Tensor:
    """Return the part of a distributed tensor that this process holds."""
    while (name := PARTS.get(type(tensor).__name__)) is not None:
        tensor = getattr(tensor, name)
    return tensor


def parts_of(tensor: Any) -> list[Tensor]:
    """Return the tensors that hold one of another library, such as 8-bit moments."""
    tensor = local(tensor)
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results of an operator."""
    if isinstance(values, Tensor):
        yield local(values)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
