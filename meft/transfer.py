"""Moving tensors between device and host, with a ledger of the bytes.

Copies run on the current stream, in order with what computes there. Host memory is
pinned where there is a GPU, so that a copy does not make the host wait.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Ledger:
    """Bytes copied so far, per direction. On a CPU both ends are host memory."""

    d2h_bytes: int = 0
    h2d_bytes: int = 0


def to_host(tensor: Tensor, ledger: Ledger) -> Tensor:
    """A copy of `tensor` in host memory."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    ledger.d2h_bytes += tensor.nbytes
    return copy


def to_device(tensor: Tensor, device: torch.device, ledger: Ledger) -> Tensor:
    """A copy of `tensor`, which is in host memory, on `device`."""
    ledger.h2d_bytes += tensor.nbytes
    return tensor.to(device, non_blocking=True, copy=True)
