"""Make fake CPU tensors take the code paths of CUDA, in Python only.

This backend is for builds of torch that `cuda_backend` cannot patch. The tensors are on
the CPU, and torch takes other code paths for them than for CUDA tensors. The memory of
a training step depends on these differences:

    is_cuda     is False, so our own CUDA kernels would not be used
    dropout     keeps a mask in the dtype of the activations; on CUDA a mask of bytes
    autocast    has other lists of operators: on CUDA, norms, softmax, powers and sums
                are computed in float32, and the tensors they save are twice as large
    optimizers  process one tensor at a time; on CUDA they process lists of tensors,
                whose peak is higher by a copy of all weights

The first and the last are patched; for the other two, operators get kernels at the
CPU's dispatch keys that behave as those of CUDA. All changes are undone at the end.

This backend cannot distinguish host and device: batches and optimizers' counters, which
stay on the host, are counted as if they were on the GPU, and no transfers are recorded.
Convolutions and recurrent cells use the CPU implementation, and so do the statistics of
norms, which are in 16 bits where the weights are.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils

from meft_bench.virtual.emulation.backend import Backend

BACKEND = Backend(
    name="cpu",
    device="cpu",
    how="fake CPU tensors on the code paths of CUDA, without traffic",
)
IN_FLOAT32 = (
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "rsqrt", "reciprocal"),
    *("exp", "expm1", "log", "log1p", "log2", "log10", "logsumexp", "softplus"),
    *("cosine_similarity", "dist"),
)
"""Operators that CUDA's autocast runs in float32, as far as models use them.

Source: ATen/autocast_mode.h, AT_FORALL_FP32.
"""
TO_FLOAT32 = (
    *("softmax.int", "log_softmax.int", "cumsum", "cumprod"),
    *("sum", "sum.dim_IntList", "linalg_vector_norm"),
)
"""The same for operators that have an argument for the dtype of their result."""

Operator = Callable[..., Any]


@contextlib.contextmanager
def like_cuda() -> Iterator[None]:
    """Make fake CPU tensors take the code paths of CUDA while the context is active."""
    with contextlib.ExitStack() as stack:
        kernels = stack.enter_context(library._scoped_library("aten", "IMPL"))
        kernels.impl("dropout", _dropout, "AutogradCPU")
        for name in IN_FLOAT32:
            kernels.impl(name, _in_float32(_operator(name)), "AutocastCPU")
        for name in TO_FLOAT32:
            kernels.impl(name, _to_float32(_operator(name)), "AutocastCPU")
        for patch in (_is_cuda(), _many_tensors_at_once()):
            stack.enter_context(patch)
        yield


def _is_cuda() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(FakeTensor, "is_cuda", True, create=True)


def _many_tensors_at_once() -> contextlib.AbstractContextManager[Any]:
    """Make optimizers use lists of tensors, which gradient clipping does anyway."""

    def devices() -> list[str]:
        return [
            *_foreach_utils._get_foreach_kernels_supported_devices(),
            BACKEND.device,
        ]

    return mock.patch(
        "torch.optim.optimizer._get_foreach_kernels_supported_devices", devices
    )


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Choose the implementation as torch does for CUDA (aten/native/Dropout.cpp)."""
    if not train or p == 0:
        return tensor
    return torch.native_dropout(tensor, p, train)[0]


def _operator(name: str) -> Operator:
    packet, _, overload = name.partition(".")
    operator: Operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator


def _in_float32(operator: Operator) -> Operator:
    """Return `operator` with its 16-bit floating-point arguments cast to float32."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return operator(*map(_wide, args), **kwargs)

    return kernel


def _to_float32(operator: Any) -> Operator:
    """Return `operator` with a result in float32, unless a dtype is given."""
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(names[1:], args, strict=False)) | kwargs
        if options.get("dtype") is None and _is_cast(tensor):
            options["dtype"] = torch.float32
        with torch._C._DisableAutocast():
            return operator(tensor, **options)

    return kernel


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and _is_cast(value)
    return value.float() if is_narrow else value


def _is_cast(tensor: Tensor) -> bool:
    """Whether autocast casts the tensor; integers and float64 are left unchanged."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64
