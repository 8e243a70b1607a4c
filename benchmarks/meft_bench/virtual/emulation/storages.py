"""Storages that code makes or resizes itself, without an operator.

The ledger sees operators. `UntypedStorage.resize_`, by which some code frees the memory
of a tensor that it keeps, is reported to the ledger, and so are the tensors that
`torch.load` makes of a file. Copies of a storage are refused, as the copy of a fake
storage does not know its device.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, UntypedStorage

from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.tensors import device_of

COPIES = ("clone", "cpu", "cuda", "to")
"""Methods of `UntypedStorage` that return a copy."""


class HasLedger(Protocol):
    """A device whose memory may be recorded."""

    ledger: Ledger | None


def of(device: HasLedger) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of storages.

    Args:
        device: the device whose ledger records them.
    """
    plain_resize: Any = UntypedStorage.resize_
    plain_restore: Any = torch._utils._restore_device_fake_mode

    def resize_(self: Any, size: int) -> Any:
        out = plain_resize(self, size)
        if device.ledger is not None:
            device.ledger.changed(self)
        return out

    def restored(tensor: Tensor) -> Tensor:
        before = device_of(tensor)
        out: Tensor = plain_restore(tensor)
        if device.ledger is not None and (now := device_of(out)) != before:
            device.ledger.changed(out.untyped_storage(), now)
        return out

    yield mock.patch.object(UntypedStorage, "resize_", resize_)
    yield mock.patch.object(UntypedStorage, "share_memory_", _shared)
    yield mock.patch.object(torch._utils, "_restore_device_fake_mode", restored)
    for name in COPIES:
        yield mock.patch.object(UntypedStorage, name, _of_real_ones(name))


_plain_share: Any = UntypedStorage.share_memory_


def _shared(self: Any) -> Any:
    """Do nothing for a fake storage: that of a GPU is shared as it is."""
    return self if self.device.type == "meta" else _plain_share(self)


def _of_real_ones(name: str) -> Any:
    plain = getattr(UntypedStorage, name)

    def copied(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "meta":
            raise NotImplementedError(
                f"`UntypedStorage.{name}` is not modelled by a virtual GPU: copy the "
                "tensor, not its storage"
            )
        return plain(self, *args, **kwargs)

    return copied
