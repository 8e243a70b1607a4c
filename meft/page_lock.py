"""Page-locks host memory, so that a GPU can copy from it while the host continues."""

import weakref
from typing import Any

import torch
from torch import Tensor

from meft.errors import MeftError
from meft.replaceable import Replaceable

_locked: dict[int, int] = {}
"""Number of bytes of each page-locked memory that is alive, by its address."""


@Replaceable
def page_locked(tensor: Tensor) -> Tensor:
    """Return the same memory, page-locked where that is useful.

    torch's own pinned allocator rounds every block up to a power of two; registering
    ordinary memory does not.

    Raises:
        MeftError: the memory cannot be page-locked.
    """
    if tensor.is_cuda or not torch.cuda.is_available() or tensor.numel() == 0:
        return tensor
    tensor, runtime = tensor.contiguous(), torch.cuda.cudart()
    code = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    storage = tensor.untyped_storage()
    weakref.finalize(storage, _unlock, runtime, tensor.data_ptr())
    if int(code) != 0:
        raise MeftError(
            f"{tensor.nbytes} bytes of host memory could not be page-locked (CUDA "
            f"error {int(code)}): free host memory or take fewer `num_neurons`"
        )
    _locked[tensor.data_ptr()] = tensor.nbytes
    return tensor


def page_locked_bytes() -> int:
    """Return the bytes of memory that `page_locked` has locked and that is alive."""
    return sum(_locked.values())


def _unlock(runtime: Any, address: int) -> None:
    _locked.pop(address, None)
    runtime.cudaHostUnregister(address)
