"""Products of groups of rows with the matrices of their experts, in any dtype.

PyTorch's rule for tensors without values knows BF16 only. On a GPU other dtypes are
multiplied group by group, into an output of the same shape.
"""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten
DTYPES = (torch.float16, torch.float32)
"""Other dtypes that CUDA's operator takes."""


def in_any_dtype() -> contextlib.AbstractContextManager[Any]:
    """Let the operator run for tensors of `DTYPES` while the context is active."""
    return mock.patch.dict(
        fake_impls.op_implementations_dict, {aten._grouped_mm.default: _grouped_mm}
    )


def _grouped_mm(
    mode: FakeTensorMode,
    func: Any,
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if a.dtype not in DTYPES or a.dtype != b.dtype:
        return NotImplemented
    with mode:
        half = func(a.to(torch.bfloat16), b.to(torch.bfloat16), offs)
        return half.to(out_dtype or a.dtype)
