"""Makes fake CUDA tensors train on a build of PyTorch that has no CUDA, or no GPU.

`FakeTensorMode` makes tensors that have a device, a shape and no memory. Two things in
the compiled part of a CPU build stand in the way of training on `cuda` ones:

    device guard   operators ask the guard of their device to switch to it, and a CPU
                   build has registered none. torch has a guard that does nothing, and
                   puts it in the place of one that counts 0 devices: such a one is
                   registered for an instant.
    CUDA hooks     autograd asks which accelerator there is and whether it was started,
                   through one object whose methods answer "none" or raise. Its table of
                   methods is copied, and three of them in the copy answer "yes".

Both are undone at the end, except for the guard, which nothing else looks at. What was
put in place is checked: where the answers are not what they should be, everything is
put back and `ShimError` tells why.

The order of methods in the table belongs to a version of torch. It was read from
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
"""Offset and type information that stand before a table's first method."""
NUM_METHODS = 64
IS_BUILT, HAS_PRIMARY_CONTEXT, INIT = 2, 4, 5
"""Places of the three methods, after two destructors."""


class ShimError(RuntimeError):
    """This build of torch cannot be made to train on fake CUDA tensors."""


class RealGpuError(ShimError):
    """There is a real GPU, beside which a virtual one does not stand."""


_kept: list[Any] = []
"""What compiled code points to from now on, and must not be collected."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """While it lasts, autograd believes that there is one CUDA device.

    Raises:
        RealGpuError: there is a real one.
        ShimError: it cannot be made to; nothing has changed.
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
    # A native function without arguments that is true for as long as there is Python.
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
