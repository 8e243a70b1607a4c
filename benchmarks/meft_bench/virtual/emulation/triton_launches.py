"""Launches of Triton kernels, which do nothing on a virtual GPU.

A kernel writes into tensors that its caller has made, and allocates nothing. What
Triton allocates to measure the candidates of an autotuned kernel is not counted.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from meft_bench.virtual.device.gpu import Gpu


def left_out(gpu: Gpu) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of Triton, if it is installed.

    Args:
        gpu: the GPU that Triton's driver describes.
    """
    if importlib.util.find_spec("triton") is None:
        return
    for module, name in (
        ("triton.runtime.jit", "JITFunction"),
        ("triton.runtime.autotuner", "Autotuner"),
        ("triton.runtime.autotuner", "Heuristics"),
    ):
        kind = getattr(importlib.import_module(module), name)
        yield mock.patch.object(kind, "run", _nothing)
    driver = importlib.import_module("triton.runtime.driver").driver
    yield mock.patch.object(driver, "_active", DriverStub(gpu))
    library = importlib.import_module("torch._library.triton")
    yield library.set_wrap_triton_enabled(False)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class DriverStub:
    """The driver of Triton, which loads a library of CUDA; it describes the GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def get_current_device(self) -> int:
        """Return 0, the only device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return 0, the only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of torch."""
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        """Return the module of torch that describes the device."""
        return torch.cuda

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Return the compute capability."""
        return self._gpu.compute_capability

    def get_current_target(self) -> Any:
        """Return what kernels are compiled for."""
        major, minor = self._gpu.compute_capability
        compiler = importlib.import_module("triton.backends.compiler")
        return compiler.GPUTarget("cuda", 10 * major + minor, 32)

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"`{name}` of Triton's driver is not modelled by a virtual GPU: take it "
            "from `torch.cuda.get_device_properties`, or leave it out"
        )
