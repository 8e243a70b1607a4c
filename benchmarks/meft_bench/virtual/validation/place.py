"""The device on which a program of this folder runs: a real GPU, or a virtual one.

Each program is written once, for `torch.cuda`; on a virtual GPU, the memory statistics
come from its ledger.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from meft_bench.shared.registry import VIRTUAL
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckFigure:
    """One number that a program reports."""

    case: str
    """The case that was run."""
    quantity: str
    """The quantity, with its unit as the suffix: `backward_peak_bytes`."""
    value: int | float | str | None
    """None if the value is not available on this device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A device to run on.

    Attributes:
        virtual: the virtual GPU; None on a real one.
        device: type of the device on which its tensors are.
    """

    virtual: VirtualGpu | None
    device: str

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Open a section of a program that starts with none of its memory allocated."""
        if self.virtual is not None:
            with self.virtual.new_ledger():
                yield
            return
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield


@contextlib.contextmanager
def place(device: str) -> Iterator[Place]:
    """Provide the place for `cuda` or `virtual-NAME` while the context is active.

    Raises:
        MissingError: there is no CUDA device.
    """
    if device.startswith(VIRTUAL):
        with VirtualGpu(gpu.find(gpu.name_in(device))) as virtual:
            yield Place(virtual=virtual, device=virtual.backend.device)
        return
    if not torch.cuda.is_available():
        raise MissingError("no CUDA device: torch.cuda.is_available() is false")
    yield Place(virtual=None, device="cuda")
