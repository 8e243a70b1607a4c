"""sha256 of tensors, rounded to a dtype or as they are."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

DIGEST_DTYPES = {"exact": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes to which values are rounded before they are digested. `exact` is compared if
the model has the dtype in which it was saved; otherwise the others are.
"""
_CHUNK = 1 << 22
"""Number of values that are rounded and digested at a time."""


def digests(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, str]:
    """Return the sha256 of each tensor's shape and values; floats are in `dtype`."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = pool.map(partial(_digest_of_one, dtype=dtype), tensors.values())
        return dict(zip(tensors, found, strict=True))


def _digest_of_one(tensor: Tensor, dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    with torch.no_grad():
        for chunk in tensor.detach().flatten().split(_CHUNK):
            if dtype is not None and chunk.is_floating_point():
                chunk = chunk.to(dtype)
            else:
                chunk = chunk.clone()  # rows cannot be viewed in another dtype
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all names, shapes and values."""
    found = sorted(digests(tensors, dtype=None).items())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
