"""Leads fake CPU tensors the way that CUDA tensors go, in Python alone.

For builds of torch that `cuda_backend` cannot patch. A tensor's device is the CPU, and
where torch asks for it, it answers otherwise than for a GPU. What a training step takes
depends on these answers:

    is_cuda     tells "no"; our own kernels for CUDA would not be asked
    dropout     keeps a mask of the activations' dtype; on CUDA one of bytes
    autocast    has other lists: on CUDA norms, softmax, powers and sums are computed
                in float32, and what they keep is twice as large
    optimizers  go tensor by tensor; on CUDA through lists of tensors, whose peak is
                higher by a copy of all weights

The first and last are patched; for the others, operators get kernels at the CPU's
dispatch keys that do as CUDA's do. All are undone at the end.

What is lost is where a tensor is: batches and optimizers' counters, which stay on the
host, are counted as if they were on the GPU, and nothing moves between the two.
Convolutions and recurrent cells stay the CPU's, and so do the statistics of norms: in
16 bits, where weights have 16.
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
    how="fake CPU tensors that are led CUDA's way, without traffic",
)
IN_FLOAT32 = (
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "rsqrt", "reciprocal"),
    *("exp", "expm1", "log", "log1p", "log2", "log10", "logsumexp", "softplus"),
    *("cosine_similarity", "dist"),
)
"""Under CUDA's autocast (ATen/autocast_mode.h, AT_FORALL_FP32), of what models call."""
TO_FLOAT32 = (
    *("softmax.int", "log_softmax.int", "cumsum", "cumprod"),
    *("sum", "sum.dim_IntList", "linalg_vector_norm"),
)
"""The same for operators that are told the dtype of their result."""

Operator = Callable[..., Any]


@contextlib.contextmanager
def like_cuda() -> Iterator[None]:
    """While it lasts, fake CPU tensors are led CUDA's way."""
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
    """The clipping of gradients takes lists on a CPU anyway."""

    def devices() -> list[str]:
        return [
            *_foreach_utils._get_foreach_kernels_supported_devices(),
            BACKEND.device,
        ]

    return mock.patch(
        "torch.optim.optimizer._get_foreach_kernels_supported_devices", devices
    )


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """As torch chooses for CUDA (aten/native/Dropout.cpp)."""
    if not train or p == 0:
        return tensor
    return torch.native_dropout(tensor, p, train)[0]


def _operator(name: str) -> Operator:
    packet, _, overload = name.partition(".")
    operator: Operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator


def _in_float32(operator: Operator) -> Operator:
    """`operator` with 16-bit floats among its tensors made wide."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return operator(*map(_wide, args), **kwargs)

    return kernel


def _to_float32(operator: Any) -> Operator:
    """`operator` told to give float32, if it is told nothing."""
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        told = dict(zip(names[1:], args, strict=False)) | kwargs
        if told.get("dtype") is None and _is_cast(tensor):
            told["dtype"] = torch.float32
        with torch._C._DisableAutocast():
            return operator(tensor, **told)

    return kernel


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and _is_cast(value)
    return value.float() if is_narrow else value


def _is_cast(tensor: Tensor) -> bool:
    """Autocast leaves integers and float64 as they are."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64
