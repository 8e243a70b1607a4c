"""Memory of the host that is the content of a file, for more than the host has.

The system keeps in main memory what was used last. The file has no name, so that it is
gone when its memory is, however the process ends. Its room on the disk is taken at
once: a disk that is full later would end the process.
"""

import errno
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from meft.errors import HostMemoryError


def zeros(shape: tuple[int, ...], dtype: torch.dtype, folder: str) -> Tensor:
    """Return a tensor of zeros in a file.

    Args:
        shape: its shape.
        dtype: its dtype.
        folder: an existing folder, on a disk with room for it.

    Raises:
        HostMemoryError: the folder does not exist or cannot be written to, or there is
            no room.
    """
    num_bytes = max(math.prod(shape) * dtype.itemsize, 1)
    try:
        handle, name = tempfile.mkstemp(prefix=".meft-rows.", dir=folder)
        try:
            os.posix_fallocate(handle, 0, num_bytes)
            mapped = torch.from_file(
                name, shared=True, size=math.prod(shape), dtype=dtype
            )
        finally:
            os.close(handle)
            Path(name).unlink()
    except OSError as error:
        raise HostMemoryError(_refusal(num_bytes, folder, error)) from error
    return mapped.view(shape)


def _refusal(num_bytes: int, folder: str, error: OSError) -> str:
    what = f"{num_bytes:,} bytes of rows cannot be kept in `folder` {folder!r}"
    if error.errno == errno.ENOSPC:
        return f"{what}: the disk is full. Free room there or take another folder"
    return f"{what}: {error.strerror}. Create it, or take a folder on a local disk"
