"""Stubs for `torch.cuda` that behave as if the virtual GPU existed.

The real functions call a library that a CPU build lacks. All work is complete at once,
on every stream (`cuda_streams`). Queries of memory are answered from the ledger
(`virtual_gpu`).
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from meft_bench.virtual.device.gpu import Gpu
from meft_bench.virtual.emulation import cuda_streams
from meft_bench.virtual.emulation.backend import Backend
from meft_bench.virtual.emulation.cuda_streams import EventStub, StreamStub

PlainGenerator: Any = torch.Generator
OF_THE_DRIVER = (
    *("utilization", "memory_usage", "temperature", "power_draw", "clock_rate"),
    *("list_gpu_processes", "current_blas_handle"),
)
"""Functions of `torch.cuda` that ask the driver for what has no answer."""
CUDA_VERSION = "13.0"
"""Version of CUDA that is shown where torch is built without it."""


def answers_of(
    gpu: Gpu, backend: Backend
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of `torch.cuda` that make it describe `gpu`.

    Args:
        gpu: the GPU to emulate.
        backend: the backend; with the `cpu` backend, `torch.cuda` reports no device.
    """
    # Code that looks for a GPU must find the device on which the tensors are.
    is_found = backend.device == "cuda"
    properties = _properties(gpu)

    def state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or gpu.computes_in_bf16

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    answers: dict[str, Any] = {
        "is_available": lambda: is_found,
        "is_initialized": lambda: is_found,
        "is_bf16_supported": is_bf16_supported,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: int(is_found),
        "current_device": zero,
        "get_rng_state": state,
        "get_rng_state_all": lambda: [state()],
        "initial_seed": zero,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: gpu.compute_capability,
        "get_device_name": lambda *_: gpu.name,
        "Stream": StreamStub,
        "Event": EventStub,
        "default_generators": (GeneratorStub(),),
        "get_sync_debug_mode": zero,
        "can_device_access_peer": lambda *_: False,
        "cudart": CudartStub,
        "current_stream": lambda *_: cuda_streams.current(),
        "default_stream": lambda *_: cuda_streams.default(),
        "stream": cuda_streams.chosen,
        "set_stream": cuda_streams.make_current,
        "device": DeviceStub,
        "device_of": DeviceStub,
    }
    silent = (
        *("_lazy_init", "synchronize", "set_device"),
        *("manual_seed", "manual_seed_all", "seed", "seed_all", "ipc_collect"),
        *("set_rng_state", "set_rng_state_all", "set_sync_debug_mode"),
    )
    answers |= dict.fromkeys(silent, nothing)
    answers |= {name: _refusal(name) for name in OF_THE_DRIVER}
    yield cuda_streams.of_a_new_gpu()
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
        # Some code takes them from the module in which they are written.
        if hasattr(torch.cuda.random, name) and name in torch.cuda.random.__all__:
            yield mock.patch.object(torch.cuda.random, name, answer)
    if is_found:  # asked by meshes of `torch.distributed`
        yield mock.patch.object(torch._C, "_get_accelerator", _accelerator)
    for name in ("current_stream", "set_stream"):
        yield mock.patch.object(torch.accelerator, name, answers[name])
    yield mock.patch.object(Tensor, "record_stream", nothing)
    # Programs that ask for TF32 look for it.
    yield mock.patch.object(torch.version, "cuda", torch.version.cuda or CUDA_VERSION)
    yield mock.patch.object(torch.cuda.nvtx, "_nvtx", NvtxStub)
    for name in ("start", "stop"):
        yield mock.patch.object(torch.cuda.profiler, name, nothing)
    for name, stub in (("Stream", StreamStub), ("Event", EventStub)):
        plain = getattr(torch, name)
        yield mock.patch.object(torch, name, _on_cuda(stub, plain))
    yield mock.patch.object(torch, "Generator", _on_cuda(GeneratorStub, PlainGenerator))
    if hasattr(fake_tensor, "init_gpu_context"):  # before torch 2.13: initialises CUDA
        yield mock.patch.object(fake_tensor, "init_gpu_context", nothing)


def _accelerator(check: bool | None = None) -> torch.device:
    return torch.device("cuda")


def _properties(gpu: Gpu) -> SimpleNamespace:
    """Return what `torch.cuda.get_device_properties` returns."""
    major, minor = gpu.compute_capability
    return SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.num_multiprocessors,
        warp_size=32,
        max_threads_per_multi_processor=gpu.max_threads_per_multiprocessor,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"`torch.cuda.{name}` has no answer on a virtual GPU, which has no driver: "
            "leave it out"
        )

    return refuse


def _on_cuda(stub: type, plain: Any) -> type:
    """Return a class that makes `stub` for the GPU, and what torch makes elsewhere."""

    class OnCuda(type):
        def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            if device is None and plain is not PlainGenerator:
                return stub(*args, **kwargs)  # the accelerator is the default
            if device is None or torch.device(device).type != "cuda":
                given = () if device is None else (device,)
                return plain(*given, *args, **kwargs)
            return stub(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, plain | stub)

    return OnCuda(stub.__name__, (), {})


class GeneratorStub(torch.Generator):
    """A generator of random numbers on the GPU, of which there are none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return a generator, which is one of the host for torch."""
        made: Self = PlainGenerator.__new__(cls, device="cpu")
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The GPU."""
        return torch.device("cuda", 0)

    def get_state(self) -> Tensor:
        """Return a state as large as that of a generator on a GPU."""
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def set_state(self, state: Tensor) -> Self:
        """Do nothing; no numbers are drawn."""
        return self

    def clone_state(self) -> Self:
        """Return another generator."""
        return type(self)()

    def graphsafe_get_state(self) -> Self:
        """Return the generator."""
        return self

    def graphsafe_set_state(self, state: Any) -> Self:
        """Do nothing; no numbers are drawn."""
        return self


class CudartStub:
    """The runtime's functions for profilers; others do not exist."""

    @staticmethod
    def cudaProfilerStart() -> int:
        """Return 0, for success."""
        return 0

    @staticmethod
    def cudaProfilerStop() -> int:
        """Return 0, for success."""
        return 0


class NvtxStub:
    """Marks for a profiler that is not there."""

    @staticmethod
    def rangePushA(message: str) -> int:
        """Return 0, the depth of the range."""
        return 0

    @staticmethod
    def rangePop() -> int:
        """Return 0, the depth of the range."""
        return 0

    @staticmethod
    def rangeStartA(message: str) -> int:
        """Return 0, the handle of the range."""
        return 0

    @staticmethod
    def rangeEnd(handle: int) -> None:
        """Do nothing."""

    @staticmethod
    def markA(message: str) -> None:
        """Do nothing."""


class DeviceStub:
    """A context in which a device is the present one, as the only one always is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.idx = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass
