"""What operators of `torch.distributed` tell of the kinds of their tensors.

FSDP2 gathers parameters in a buffer and copies them out of it; gradients are copied
into a buffer from which they are reduced and scattered.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from meft_bench.virtual.recording.tensors import tensors_in

COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of operators whose tensors are sent or received."""
COPY_OUT = "fsdp::split_with_sizes_copy"
"""FSDP2's operator that copies gathered parameters to where they are used."""


def kinds_of(
    func: Any, args: Any, kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, str]]:
    """Yield the tensors whose kind follows from an operator, and that kind.

    Args:
        func: the operator.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    if func.namespace in COLLECTIVES:
        for tensor in tensors_in([*args, *kwargs.values()]):
            yield tensor, "communication"
    elif func.namespace == "fsdp" and func.name() == COPY_OUT:
        for tensor in tensors_in(kwargs["out"]):
            yield tensor, "unsharded"
