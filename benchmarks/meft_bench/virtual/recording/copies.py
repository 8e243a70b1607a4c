"""Copies between host and device, among the operators of a step."""

from collections.abc import Mapping
from typing import Any

import torch

from meft_bench.virtual.recording.tensors import device_of

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)


def between_devices(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    accelerator: str,
) -> tuple[str, int] | None:
    """Return the direction and the bytes of a copy to or from the device.

    Args:
        func: the operator.
        args: its positional arguments.
        kwargs: its other arguments.
        out: its result.
        accelerator: type of the device.

    Returns:
        `h2d` or `d2h` and the number of bytes; None for any other operator.
    """
    if func not in COPIES:
        return None
    source, target = (args[0], out) if func is COPIES[1] else (args[1], args[0])
    pair = device_of(source), device_of(target)
    directions = {("cpu", accelerator): "h2d", (accelerator, "cpu"): "d2h"}
    direction = directions.get(pair) if pair[0] != pair[1] else None
    if direction is None:
        return None
    # A change of dtype happens on the host, or on the GPU in a copy that is not waited
    # for (Copy.cu): what crosses the link has the dtype of the other side.
    is_waited_for = not kwargs.get("non_blocking", len(args) > 2 and bool(args[2]))
    crosses = target if (direction == "h2d") == is_waited_for else source
    return direction, source.numel() * crosses.element_size()
