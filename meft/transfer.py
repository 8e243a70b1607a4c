"""Transfer of tensors between device and host, with a ledger of the bytes.

Host memory is pinned if there is a GPU, so that a copy does not block the host.
`to_host` and `to_device` run on the current stream, in order with its computations; a
`Link` has its own stream for each direction, so that copies overlap with computation.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TransferTag(NamedTuple):
    """The key under which the bytes of one transfer are recorded."""

    place: str = ""
    """Part of the model, such as the name of a block."""
    phase: str = ""
    """`forward`, `backward` or `update`."""


_UNNAMED = TransferTag()


@dataclass(slots=True)
class TransferLedger:
    """Bytes copied so far, per direction. On a CPU both ends are host memory."""

    d2h: Counter[TransferTag] = field(default_factory=Counter)
    h2d: Counter[TransferTag] = field(default_factory=Counter)

    @property
    def d2h_bytes(self) -> int:
        """Return the bytes copied from device to host."""
        return self.d2h.total()

    @property
    def h2d_bytes(self) -> int:
        """Return the bytes copied from host to device."""
        return self.h2d.total()

    def clear(self) -> None:
        """Set all counts to 0."""
        self.d2h.clear()
        self.h2d.clear()


def to_host(
    tensor: Tensor, ledger: TransferLedger, tag: TransferTag = _UNNAMED
) -> Tensor:
    """Return a copy of `tensor` in host memory.

    Args:
        tensor: a tensor on the device.
        ledger: where the bytes are counted.
        tag: the key in the ledger.
    """
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    ledger.d2h[tag] += tensor.nbytes
    return copy


def to_device(
    tensor: Tensor,
    device: torch.device,
    ledger: TransferLedger,
    tag: TransferTag = _UNNAMED,
) -> Tensor:
    """Return a copy of `tensor`, which is in host memory, on `device`.

    Args:
        tensor: a tensor in host memory.
        device: the device to copy to.
        ledger: where the bytes are counted.
        tag: the key in the ledger.
    """
    ledger.h2d[tag] += tensor.nbytes
    return tensor.to(device, non_blocking=True, copy=True)


class Link:
    """Transfers between the host and `device`, with a separate stream per direction.

    On a CPU the same methods copy synchronously.
    """

    def __init__(self, device: torch.device, ledger: TransferLedger) -> None:
        self.device = device
        self.ledger = ledger
        is_cuda = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if is_cuda else None
        self._down = torch.cuda.Stream(device) if is_cuda else None

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the host from which a tensor is uploaded at once."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._up is not None)

    def upload(self, tensor: Tensor, tag: TransferTag) -> "PendingCopy":
        """Start to copy `tensor`, in host memory, to the device."""
        if self._up is None:
            return PendingCopy(to_device(tensor, self.device, self.ledger, tag), None)
        # torch's host allocator does not reuse a pinned block before the copy that
        # reads it has finished.
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._up):
            copy = to_device(pinned, self.device, self.ledger, tag)
            return PendingCopy(copy, self._up.record_event())

    def download(self, tensor: Tensor, tag: TransferTag) -> "PendingCopy":
        """Start to copy `tensor`, on the device, to the host."""
        if self._down is None:
            return PendingCopy(to_host(tensor, self.ledger, tag), None)
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            copy = to_host(tensor, self.ledger, tag)
            tensor.record_stream(self._down)
            return PendingCopy(copy, self._down.record_event())


@dataclass(frozen=True, slots=True)
class PendingCopy:
    """A copy that may not have finished."""

    _tensor: Tensor
    _done: Any
    """Event after the copy, or a substitute; None if the copy was synchronous."""

    @property
    def wait(self) -> Callable[[], object]:
        """Return a function that waits on the host, and does not keep the copy."""
        return _nothing if self._done is None else self._done.synchronize

    def get(self) -> Tensor:
        """Return the copy, synchronized with the host or with the current stream."""
        if self._done is None:
            return self._tensor
        if not self._tensor.is_cuda:
            self._done.synchronize()
            return self._tensor
        stream = torch.cuda.current_stream(self._tensor.device)
        stream.wait_event(self._done)
        self._tensor.record_stream(stream)
        return self._tensor


def _nothing() -> None:
    """Wait for a copy that was synchronous."""
