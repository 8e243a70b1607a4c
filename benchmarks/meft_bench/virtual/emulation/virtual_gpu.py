"""A virtual GPU: fake tensors on a device that answers as a GPU of that name would.

    with VirtualGpu(gpu.find("H200")) as device:
        model = build().to(device.backend.device)  # no memory is taken
        with device.new_ledger() as ledger: ...

While it lasts, torch and transformers are patched so that a training step takes the
same way as on the real one. Each patch says what would go wrong without it. All are
undone at the end.
"""

import contextlib
import dataclasses
import importlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, library
from torch._ops import OpOverload
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from meft.reversible import fixed
from meft_bench.virtual.device import attention, workspaces
from meft_bench.virtual.device.gpu import Gpu, library_bytes
from meft_bench.virtual.emulation import (
    cpu_backend,
    cuda_backend,
    cuda_stubs,
    triton_stand_in,
    unsupported,
)
from meft_bench.virtual.emulation.backend import Backend
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.replay import Replay, replay

aten = torch.ops.aten
PINNING = (aten._pin_memory.default, aten.is_pinned.default)
"""Asks CUDA, which is not there."""
WHOLE_OPERATORS = ("silu_backward", "mish_backward")
"""They have kernels on CUDA, and steps for devices that have none."""


class _Mode(FakeTensorMode):
    # A property of the base class, which would start a GPU once `is_available()` says
    # that there is one.
    avoid_device_init = True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] = MappingProxyType({}),
    ) -> object:
        """What is made on the host of real tensors alone is real; so is a number that
        models draw there to decide whether a layer is left out."""
        if not types and (
            (func not in PINNING and _is_real(args, kwargs))
            or (func is aten.rand.default and _is_host_scalar(args, kwargs))
        ):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class VirtualGpu:
    """While it lasts, there is a fake device that behaves as `gpu`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.workspaces = workspaces.of(gpu)
        self.backend = cuda_backend.BACKEND
        """Which was taken, and on which device tensors live: told once it is there."""
        self.attention_counts: dict[str, int] = {}
        """How often each kernel of attention was chosen."""
        self.mode = _Mode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.ledger: Ledger | None = None
        """Answers for `torch.cuda`'s figures of memory, once there is one."""
        self._peaks_since = 0
        self._emptied: list[int] = []
        """When the cache was emptied."""
        self._replays: dict[tuple[int, int], Replay] = {}
        """The last, by when its peaks began and how many events it has."""
        self._stack = contextlib.ExitStack()

    def new_ledger(self) -> Ledger:
        """One for its tensors, which from now on answers for `torch.cuda`'s figures."""
        self.ledger = Ledger(
            self.workspaces,
            accelerator=self.backend.device,
            library_bytes=library_bytes(self.gpu, torch.__version__),
        )
        self._peaks_since = 0
        self._emptied.clear()
        self._replays.clear()
        return self.ledger

    def reset_peaks(self, *_: Any) -> None:
        """Forget the peaks so far."""
        if self.ledger is not None:
            self._peaks_since = self.ledger.mark()

    def empty_cache(self) -> None:
        """Give what is reserved and free back to the driver."""
        if self.ledger is not None:
            self._emptied.append(self.ledger.mark())
            self._replays.clear()

    def peaks(self) -> Replay:
        """The most that was allocated and reserved since then.

        Raises:
            torch.OutOfMemoryError: it was more than the GPU has.
        """
        assert self.ledger is not None, "no ledger has been put in"
        asked = self._peaks_since, self.ledger.num_events
        if asked not in self._replays:  # which takes as long as a step
            found = replay(
                self.ledger.trace(),
                capacity_bytes=self.gpu.memory_bytes - self.gpu.context_bytes,
                start=self._peaks_since,
                emptied=self._emptied,
            )
            self._replays = {asked: found}
        return self._replays[asked]

    def _free_bytes(self) -> int:
        taken = self.gpu.context_bytes + self.peaks().end_reserved_bytes
        return self.gpu.memory_bytes - taken

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(unsupported.told_in_words())
            self.backend = _enter_backend(stack)
            for patch in self._patches():
                stack.enter_context(patch)
            stack.enter_context(self.mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _patches(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        # In the calling thread: the same order in every run, and no thread that is
        # still at work when the process ends.
        yield torch.autograd.set_multithreading_enabled(False)
        yield from cuda_stubs.answers_of(self.gpu, self.backend)
        yield from self._memory()
        yield from _attention(self.gpu, self.backend, self.attention_counts)
        yield from _many_tensors_at_once()
        yield _our_kernels()
        yield _whole_operators()
        yield from _values()
        yield from _initialisation()
        yield from _moving_modules()
        yield from _masks()

    def _memory(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        """Code that reads `torch.cuda`'s figures reads the ledger's."""
        answers: dict[str, Any] = {
            "reset_peak_memory_stats": self.reset_peaks,
            "empty_cache": self.empty_cache,
            "max_memory_allocated": lambda *_: self.peaks().allocated_bytes,
            "max_memory_reserved": lambda *_: self.peaks().reserved_bytes,
            "memory_allocated": lambda *_: self.peaks().end_allocated_bytes,
            "memory_reserved": lambda *_: self.peaks().end_reserved_bytes,
            "mem_get_info": lambda *_: (self._free_bytes(), self.gpu.memory_bytes),
        }
        for name, answer in answers.items():
            yield mock.patch.object(torch.cuda, name, answer)


def _enter_backend(stack: contextlib.ExitStack) -> Backend:
    """The backend that this build of torch can take."""
    try:
        stack.enter_context(cuda_backend.fake_cuda())
    except cuda_backend.RealGpuError:
        raise
    except cuda_backend.ShimError as error:
        stack.enter_context(cpu_backend.like_cuda())
        how = f"{cpu_backend.BACKEND.how} ({error})"
        return dataclasses.replace(cpu_backend.BACKEND, how=how)
    return cuda_backend.BACKEND


def _attention(
    gpu: Gpu, backend: Backend, counts: dict[str, int]
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """A build without CUDA kernels takes the plain one, which keeps all scores."""
    plain = functional.scaled_dot_product_attention
    ours = attention.replacement(gpu, backend.device, plain, counts)
    for owner in (functional, torch._C._nn):
        yield mock.patch.object(owner, "scaled_dot_product_attention", ours)


def _many_tensors_at_once() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Optimizers and clipping go tensor by tensor for types that they do not know, and
    their peak is then lower by a copy of all weights."""
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        module = importlib.import_module(name)
        known = module._foreach_supported_types
        yield mock.patch.object(
            module, "_foreach_supported_types", [*known, FakeTensor]
        )


def _our_kernels() -> contextlib.AbstractContextManager[Any]:
    """Triton would launch them, and warn that it cannot."""
    return mock.patch.object(fixed, "_kernels_on", return_value=triton_stand_in)


@contextlib.contextmanager
def _whole_operators() -> Iterator[None]:
    """A build without CUDA takes these operators apart, into steps each of which makes
    a tensor: backward of LLaMA's activation would hold two of them more."""
    lacking = [
        name
        for name in WHOLE_OPERATORS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")
    ]
    with library._scoped_library("aten", "IMPL") as kernels:
        for name in lacking:
            kernels.impl(name, _never_run, "CUDA")
        yield


def _values() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Python that looks at a value: a check holds, a number is 0.

    What torch asks so are masks ("is there no padding?"), losses ("is it finite?") and
    scales; ours asks whether two things are equal.
    """

    def item(mode: Any, func: Any, tensor: Tensor) -> bool | float | int:
        if tensor.dtype is torch.bool:
            return True
        return 0.0 if tensor.dtype.is_floating_point else 0

    def equal(mode: Any, func: Any, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and one.dtype == other.dtype

    def pin(mode: Any, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
        return torch.empty_like(tensor)

    def is_pinned(mode: Any, func: Any, tensor: Tensor, device: Any = None) -> bool:
        return False

    yield mock.patch.dict(
        fake_impls.op_implementations_dict,
        {
            aten._local_scalar_dense.default: item,
            aten.equal.default: equal,
            aten._pin_memory.default: pin,
            aten.is_pinned.default: is_pinned,
        },
    )


def _initialisation() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """There are no values to draw, and a draw that is repeated until it suits never
    ends. transformers' own way to skip it would also leave weights untied."""

    def same(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    for module in (
        torch.nn.init,
        importlib.import_module("transformers.initialization"),
    ):
        for name in dir(module):
            if name.endswith("_") and not name.startswith("_"):
                yield mock.patch.object(module, name, same)


def _moving_modules() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """`Module.to` swaps fake tensors, and refuses those with weak references, which
    they all have."""
    plain: Any = torch.utils.swap_tensors

    def swap(one: Any, other: Tensor) -> None:
        written = dict(vars(one))
        hooks = [*(one._post_accumulate_grad_hooks or {}).values()]
        with mock.patch.object(weakref, "getweakrefs", _none):
            plain(one, other)
        # A move leaves on a parameter what others have written there.
        vars(one).update({k: v for k, v in written.items() if k not in vars(one)})
        one._post_accumulate_grad_hooks = None
        for hook in hooks:
            one.register_post_accumulate_grad_hook(hook)

    yield mock.patch.object(torch.utils, "swap_tensors", swap)


def _masks() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """transformers takes fake tensors for tracing, and then always makes a mask."""
    masking = importlib.import_module("transformers.masking_utils")
    yield mock.patch.object(masking, "is_tracing", _no)


def _is_real(args: Sequence[object], kwargs: Mapping[str, Any]) -> bool:
    """Whether real tensors go in, as none is fake, and what comes out stays with them
    on the host."""
    device = kwargs.get("device")
    return (device is None or torch.device(device).type == "cpu") and any(
        isinstance(arg, Tensor)
        or (isinstance(arg, list | tuple) and any(isinstance(a, Tensor) for a in arg))
        for arg in args
    )


def _is_host_scalar(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether what is drawn is a single number on the host."""
    device = kwargs.get("device")
    return not args[0] and (device is None or torch.device(device).type == "cpu")


# Functions and no mocks, which would remember what they were called with.


def _no(*args: Any) -> bool:
    return False


def _never_run(*args: Any) -> None:
    raise AssertionError("fake tensors come first")


def _none(*args: Any) -> list[Any]:
    return []
