"""Where a program of this folder runs: on a real GPU, or on a virtual one.

A program is written once, against `torch.cuda`, whose figures of memory a virtual GPU
answers from its ledger.
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
class Figure:
    """One number that a program reports."""

    case: str
    """What was run."""
    quantity: str
    """What the number is, its unit as the ending: `backward_peak_bytes`."""
    value: int | float | str | None
    """None: not known here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A device to run on.

    Attributes:
        virtual: the virtual GPU; None on a real one.
        device: type of the device that its tensors live on.
    """

    virtual: VirtualGpu | None
    device: str

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A stretch of the program that starts with nothing allocated by itself."""
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
    """The place that `cuda` or `virtual-NAME` names, for as long as the body lasts.

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
