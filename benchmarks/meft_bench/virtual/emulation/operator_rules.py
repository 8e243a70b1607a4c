"""Rules for tensors without values that torch lacks, or that are looser than its own.

convolutions          in the memory format of their arguments, as cuDNN's
reduced losses        keep the memory of all elements
as_strided            refuses what is beyond the storage, as tensors with memory do
random numbers        in place, from a generator
recurrent cells       fused on CUDA, with a workspace that is kept for backward; torch
                      has no rule for a GRU's, nor for an LSTM's without biases
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_impls

aten = torch.ops.aten
FORMAT_OF_CONVOLUTION = "_conv_determine_backend_memory_format"
_plain_format: Any = getattr(torch._C, FORMAT_OF_CONVOLUTION)
GRU_WORKSPACE = 5
LSTM_WORKSPACE = 4
"""Numbers that a cell keeps for backward, per hidden unit (native/cuda/RNN.cu)."""


@contextlib.contextmanager
def added() -> Iterator[None]:
    """Add the rules while the context is active."""
    with (
        mock.patch.dict(fake_impls.op_implementations_dict, _RULES),
        mock.patch.object(torch._C, FORMAT_OF_CONVOLUTION, _format_of_convolution),
    ):
        yield


def _format_of_convolution(input: Any, weight: Any, backend: Any) -> Any:
    """Return the memory format of a convolution, which cuDNN takes from its arguments.

    A build without cuDNN has other kernels, most of which are contiguous.
    """
    device = getattr(input, "fake_device", input.device)
    if device.type == "cpu" or not torch.backends.cudnn.enabled:
        return _plain_format(input, weight, backend)
    formats = {suggest_memory_format(one) for one in (input, weight)}
    others = formats & {torch.channels_last, torch.channels_last_3d}
    return next(iter(others), torch.contiguous_format)


def _as_strided(
    mode: Any, func: Any, tensor: Tensor, size: Any, stride: Any, offset: Any = None
) -> Any:
    if 0 in size:
        return NotImplemented
    start = tensor.storage_offset() if offset is None else offset
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    needed = (start + last + 1) * tensor.element_size()
    room = tensor.untyped_storage().nbytes()
    if needed > room:
        raise RuntimeError(
            f"setStorage: sizes {[*size]}, strides {[*stride]}, storage offset "
            f"{start}, and itemsize {tensor.element_size()} requiring a storage size "
            f"of {needed} are out of bounds for storage of size {room}"
        )
    return NotImplemented


def _filled(mode: Any, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _gru_cell(
    mode: Any, func: Any, gates: Tensor, hidden_gates: Tensor, state: Tensor, *_: Any
) -> Any:
    rows, width = state.shape
    return state.new_empty(rows, width), state.new_empty(rows, GRU_WORKSPACE * width)


def _lstm_cell(
    mode: Any, func: Any, gates: Tensor, hidden_gates: Tensor, state: Tensor, *_: Any
) -> Any:
    rows, width = state.shape
    states = [state.new_empty(rows, width) for _ in range(2)]
    return (*states, gates.new_empty(rows, LSTM_WORKSPACE * width))


def _gru_cell_backward(
    mode: Any, func: Any, gradient: Tensor, workspace: Tensor, has_bias: bool
) -> Any:
    rows, width = gradient.shape
    gates = [workspace.new_empty(rows, 3 * width) for _ in range(2)]
    state = gradient.new_empty(rows, width)
    biases = [one.sum(0) if has_bias else None for one in gates]
    return (*gates, state, *biases)


REDUCED = frozenset(
    {
        aten.mse_loss.default,
        aten.smooth_l1_loss.default,
        aten.binary_cross_entropy.default,
    }
)
"""Losses whose kernels make a tensor of all elements smaller, for which torch has a
rule, which is another one."""


def reduced_loss(func: Any, input: Tensor, target: Tensor, *args: Any) -> Any:
    """Return a scalar in the memory of all elements; None if nothing is reduced.

    The storage of a tensor that is resized stays as large as it was (native/Loss.cpp).

    Args:
        func: one of `REDUCED`.
        input: the predictions.
        target: the labels.
        args: the other arguments of the operator.
    """
    at = [one.name for one in func._schema.arguments].index("reduction") - 2
    if (args[at] if len(args) > at else 1) == 0:
        return None
    shape = torch.broadcast_shapes(input.shape, target.shape)
    whole = input.new_empty(shape, dtype=torch.promote_types(input.dtype, target.dtype))
    return whole.as_strided((), ()) if whole.numel() else None


_RULES: dict[Any, Any] = {
    aten.as_strided.default: _as_strided,
    aten.exponential_.default: _filled,
    aten.geometric_.default: _filled,
    aten.cauchy_.default: _filled,
    aten.log_normal_.default: _filled,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}
