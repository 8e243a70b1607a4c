"""Make fake CUDA tensors train on a build of PyTorch without CUDA, or without a GPU.

`FakeTensorMode` makes tensors that have a device and a shape but no memory. Two parts
of the compiled code of a CPU build prevent training with fake `cuda` tensors:

    device guard   operators switch to a device through its guard, and a CPU build has
                   not registered one for CUDA. torch has a guard that does nothing,
                   and installs it in place of a registered guard that counts 0
                   devices: such a guard is registered temporarily.
    CUDA hooks     autograd queries which accelerator exists and whether it is
                   initialised, through one object whose methods return "none" or
                   raise. Its table of methods is copied, and three methods of the
                   copy are replaced by one that returns true.

Both changes are undone at the end, except for the guard, which nothing else uses. The
result is checked: if the hooks do not return the expected values, everything is
restored and `ShimError` states the reason.

The order of methods in the table depends on the version of torch. It was read from
ATen/detail/CUDAHooksInterface.h.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from meft_bench.virtual.emulation.backend import Backend

BACKEND = Backend(name="cuda", device="cuda", how="fake CUDA tensors")
CUDA = 1
"""c10::DeviceType::CUDA."""
NUM_DEVICE_TYPES = 22
HEAD = 2
"""Offset and type information that precede a table's first method."""
NUM_METHODS = 64
IS_BUILT, HAS_PRIMARY_CONTEXT, INIT = 2, 4, 5
"""Indices of the three methods, after two destructors."""


class ShimError(RuntimeError):
    """Raised when this build of torch cannot be made to train on fake CUDA tensors."""


class RealGpuError(ShimError):
    """Raised when there is a real GPU, which cannot be combined with a virtual one."""


_kept: list[Any] = []
"""Objects that compiled code points to and that must not be garbage-collected."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Make autograd behave as if there were one CUDA device, in this context.

    Raises:
        RealGpuError: there is a real CUDA device.
        ShimError: torch cannot be patched; nothing has changed.
    """
    if torch.cuda.is_available():
        raise RealGpuError("there is a real GPU, which is left alone")
    _install_guard()
    with _hooks_that_answer_yes():
        yield


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))


def _install_guard() -> None:
    try:
        registry = (ctypes.c_void_p * NUM_DEVICE_TYPES).in_dll(
            _library("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
        )
        ensure = torch._C._ensureCUDADeviceGuardSet
    except (OSError, ValueError, AttributeError) as error:
        raise ShimError(
            f"no registry of device guards in this torch: {error}"
        ) from error
    if registry[CUDA]:
        ensure()
        return
    # A guard each of whose methods returns 0: a table of methods, and an object that
    # points to it.
    zero = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda _: 0)
    address = ctypes.cast(zero, ctypes.c_void_p).value
    table = (ctypes.c_void_p * NUM_METHODS)(*[address] * NUM_METHODS)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    _kept.extend((zero, table, guard))
    registry[CUDA] = ctypes.addressof(guard)
    ensure()
    if registry[CUDA] == ctypes.addressof(guard):
        registry[CUDA] = None
        raise ShimError("torch did not put its own idle guard in place")


@contextlib.contextmanager
def _hooks_that_answer_yes() -> Iterator[None]:
    try:
        get = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    except (OSError, AttributeError) as error:
        raise ShimError(f"no CUDA hooks in this torch: {error}") from error
    get.restype, get.argtypes = ctypes.c_void_p, []
    hooks = ctypes.cast(get(), ctypes.POINTER(ctypes.c_void_p))
    before = hooks[0]
    assert before is not None
    size = ctypes.sizeof(ctypes.c_void_p)
    whole = ctypes.c_void_p * (HEAD + NUM_METHODS)
    table = whole(*whole.from_address(before - HEAD * size))
    # A native function without arguments that returns true while Python is running.
    yes = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    for method in (IS_BUILT, HAS_PRIMARY_CONTEXT, INIT):
        table[HEAD + method] = yes
    _kept.append(table)
    hooks[0] = ctypes.addressof(table) + HEAD * size
    try:
        found = torch.accelerator.current_accelerator()
        if found is None or found.type != "cuda":
            raise ShimError(
                f"torch {torch.__version__} has its CUDA hooks in another order: the "
                f"accelerator is {found}"
            )
        yield
    finally:
        hooks[0] = before
