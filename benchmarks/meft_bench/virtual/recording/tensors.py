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


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results of an operator."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
