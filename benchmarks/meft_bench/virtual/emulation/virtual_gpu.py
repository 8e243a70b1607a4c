"""A virtual GPU: fake tensors on a device that behaves as the named GPU.

    with VirtualGpu(gpu.find("H200")) as device:
        with device.new_ledger() as ledger:  # counts what is made inside
            model = build().to(device.backend.device)  # no memory is taken

While the context is active, torch and transformers are patched so that a training step
takes the same code paths as on the real GPU. The docstring of each patch states what
would go wrong without it. All patches are undone at the end.
"""

import contextlib
import dataclasses
import importlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
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
    cuda_streams,
    cuda_stubs,
    grouped_products,
    memory_answers,
    operator_rules,
    storages,
    triton_launches,
    triton_stand_in,
    unsupported,
)
from meft_bench.virtual.emulation.assumed_conditions import Conditions
from meft_bench.virtual.emulation.backend import Backend
from meft_bench.virtual.emulation.early_imports import everywhere
from meft_bench.virtual.emulation.known_values import UNKNOWN, KnownValues
from meft_bench.virtual.emulation.memo import INDEX, MASKS, Memo
from meft_bench.virtual.emulation.operator_rules import REDUCED, reduced_loss
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.live_memory import LiveMemory
from meft_bench.virtual.recording.replay import Replay, held_by

aten = torch.ops.aten
PINNING = (aten._pin_memory.default, aten.is_pinned.default)
"""Operators that call CUDA, which is not available."""
WHOLE_NUMBERS = (aten.randperm, aten.randint)
FACTORIES = (aten.arange, aten.zeros, aten.ones, aten.full, aten.empty)
"""Operators that make tensors from no others, of integers only or of any dtype."""
WHOLE_OPERATORS = ("silu_backward", "mish_backward")
"""Operators with a kernel on CUDA that other devices decompose into steps."""


class _Mode(FakeTensorMode):
    # A property of the base class, which would initialise a GPU once `is_available()`
    # returns true.
    avoid_device_init = True
    conditions: Conditions
    memo: Memo | None = None
    """What operators make; None asks torch each time."""
    makes_real_integers = False
    """Whether integers made on the host, as lengths and permutations, have values."""
    thread: int | None = None
    """The thread that has entered the virtual GPU, whose operators are recorded."""
    values: KnownValues | None = None
    """What follows from these integers on the GPU; None if they have no values."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper around the dispatch costs time

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] = MappingProxyType({}),
    ) -> object:
        """Run an operator for real if it makes host tensors from real tensors only.

        The same holds for a random number that models draw on the host to decide
        whether a layer is skipped.
        """
        if self.thread not in (None, get_ident()):
            raise NotImplementedError(
                f"`{func}` ran in another thread, in which memory is not counted: run "
                "it in the thread that has entered the virtual GPU"
            )
        device: Any = kwargs.get("device")
        if device is not None and (torch.device(device).index or 0) > 0:
            raise RuntimeError(
                f"CUDA error: invalid device ordinal: {device}; a virtual GPU is one "
                "device"
            )
        if self.makes_real_integers and _is_host_integer(func, args, kwargs):
            return func(*args, **kwargs)
        if not types:
            if func in PINNING:
                if self.values is not None and func is PINNING[0]:
                    (tensor,) = args
                    assert isinstance(tensor, Tensor)
                    if not tensor.dtype.is_floating_point:
                        return tensor.clone()
            elif _is_real(args, kwargs) or (
                func is aten.rand.default and _is_host_scalar(args, kwargs)
            ):
                return func(*args, **kwargs)
        if self.values is not None:
            found = self.values.answer(self, func, args, kwargs)
            if found is not UNKNOWN:
                return found
        if func in REDUCED and isinstance(args[0], FakeTensor):
            reduced = reduced_loss(func, *args)  # type: ignore[arg-type]
            if reduced is not None:
                return reduced
        if func is INDEX:
            args = (args[0], self._without_masks(args[1]))
        plain = super().__torch_dispatch__
        if self.memo is None:
            out = plain(func, types, args, kwargs)
        else:
            out = self.memo.run(
                self, func, args, kwargs, lambda: plain(func, types, args, kwargs)
            )
        self.conditions.note(func, args, out)
        if self.values is not None:
            self.values.note(func, args, kwargs, out)
        return out

    def _without_masks(self, indices: Any) -> list[Any]:
        """Return indices with the places of masks whose values are known.

        A GPU takes masks of the host, and bytes as masks, too.
        """
        found: list[Any] = []
        for index in indices:
            if not isinstance(index, Tensor) or index.dtype not in MASKS:
                found.append(index)
                continue
            values = index if type(index) is not FakeTensor else None
            if values is None and self.values is not None:
                values = self.values.of(index)
            if values is not None:
                found += values.nonzero(as_tuple=True)
            else:
                found.append(index if index.dtype is torch.bool else index != 0)
        return found

    def _cached_dispatch_impl(
        self, func: OpOverload, types: Any, args: Any, kwargs: Any
    ) -> object:
        """Run an operator by torch's cache, whose keys would keep storages alive."""
        if func._overloadpacket is aten.set_:
            return self._dispatch_impl(func, types, args, kwargs)
        return super()._cached_dispatch_impl(func, types, args, kwargs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Since:
    """What a ledger had counted at a moment.

    Attributes:
        time: the moment, in operators.
        flops: floating-point operations, by phase.
        touched: bytes of the device that had been read and written, by phase.
        touched_by_host: the same of host memory.
    """

    time: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)
    touched_by_host: Counter[str] = field(default_factory=Counter)


class VirtualGpu:
    """Emulate `gpu` with a fake device while the context is active."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.has_padding = False
        """Whether an attention mask is taken to hide some tokens; it has no values."""
        self.num_ranks = 1
        """Number of ranks that train together, of which this is the GPU of rank 0."""
        self.workspaces = workspaces.of(gpu)
        self.backend = cuda_backend.BACKEND
        """The backend with the device of the tensors; final once the context is
        open."""
        self.attention_counts: dict[str, int] = {}
        """Number of calls of each attention kernel."""
        self.mode = _Mode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.mode.conditions = Conditions()
        self.ledger: Ledger | None = None
        """Source of the memory statistics of `torch.cuda`, once there is a ledger."""
        self._memory: LiveMemory | None = None
        self.since = Since()
        """What the ledger had counted when peaks were last reset."""
        self._stack = contextlib.ExitStack()

    def new_ledger(self, out_of_memory: str = "raise at query") -> Ledger:
        """Return a new ledger, which provides the memory statistics from now on.

        Args:
            out_of_memory: what happens when the GPU has no room for the output of an
                operator, one of `live_memory.OUT_OF_MEMORY`.
        """
        usable_bytes = self.gpu.memory_bytes - self.gpu.context_bytes
        self._memory = LiveMemory(usable_bytes, out_of_memory)
        self.ledger = Ledger(
            self.workspaces,
            accelerator=self.backend.device,
            library_bytes=library_bytes(self.gpu, torch.__version__),
            memory=self._memory,
            cuda_stream=lambda: cuda_streams.current().stream_id,
        )
        self.since = Since()
        return self.ledger

    def reset_peaks(self) -> None:
        """Count peaks, copies and work from now on.

        Raises:
            RuntimeError: there is no ledger yet.
        """
        self.memory.allocator.reset_peaks()
        assert self.ledger is not None
        self.since = Since(
            time=self.ledger.mark(),
            flops=self.ledger.flops.copy(),
            touched=self.ledger.touched.copy(),
            touched_by_host=self.ledger.touched_by_host.copy(),
        )

    def add_host_traffic(self, num_bytes: int) -> None:
        """Count bytes that code without operators reads and writes on the host."""
        if self.ledger is not None:
            self.ledger.add_host_traffic(num_bytes)

    @property
    def memory(self) -> LiveMemory:
        """The memory as the ledger has recorded it so far.

        Raises:
            RuntimeError: there is no ledger yet.
        """
        if self._memory is None:
            raise RuntimeError(
                "a virtual GPU counts memory from `new_ledger()` on: make the model "
                "and train inside `with device.new_ledger():`"
            )
        return self._memory

    def peaks(self) -> Replay:
        """Return the peaks of allocated and reserved bytes since the last reset.

        Raises:
            torch.OutOfMemoryError: there was no room, and queries raise that.
        """
        if self.memory.error and self.memory.out_of_memory == "raise at query":
            raise torch.OutOfMemoryError(self.memory.error)
        return held_by(self.memory.allocator)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(unsupported.error_translation())
            self.backend = _enter_backend(stack)
            self.mode.thread = get_ident()
            self.mode.memo = Memo()
            if self.mode.makes_real_integers:
                self.mode.values = KnownValues(self.backend.device)
            for patch in self._patches():
                stack.enter_context(patch)
            stack.enter_context(self.mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _patches(self) -> Iterator[contextlib.AbstractContextManager[Any]]:
        # Backward runs in the calling thread: the order is the same in every run, and
        # no thread is still running when the process ends.
        yield torch.autograd.set_multithreading_enabled(False)
        yield from cuda_stubs.answers_of(self.gpu, self.backend)
        yield from memory_answers.of(self)
        yield from storages.of(self)
        yield from _attention(self.gpu, self.backend, self.attention_counts)
        yield from _many_tensors_at_once()
        yield _our_kernels()
        yield from triton_launches.left_out(self.gpu)
        yield _whole_operators()
        yield grouped_products.in_any_dtype()
        yield operator_rules.added()
        yield from _values(self.mode.conditions)
        yield from _initialisation()
        yield from _moving_modules()
        yield from _masks(lambda *_, **__: self.has_padding)


def _enter_backend(stack: contextlib.ExitStack) -> Backend:
    """Enter and return the backend that this build of torch supports."""
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
    """A build without CUDA kernels would use `math`, which keeps all scores."""
    yield attention.priority_of(gpu)
    plain = functional.scaled_dot_product_attention
    ours = attention.replacement(gpu, backend.device, plain, counts)
    yield mock.patch.object(torch._C._nn, "scaled_dot_product_attention", ours)
    yield from everywhere(plain, "scaled_dot_product_attention", ours)


def _many_tensors_at_once() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Optimizers and clipping process unknown types one tensor at a time.

    Their peak would be lower by a copy of all weights.
    """
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        module = importlib.import_module(name)
        known = module._foreach_supported_types
        yield mock.patch.object(
            module, "_foreach_supported_types", [*known, FakeTensor]
        )


def _our_kernels() -> contextlib.AbstractContextManager[Any]:
    """Triton would try to launch the kernels, and warn that it cannot."""
    return fixed.kernels_on.replaced(_stand_in_for_triton)


@contextlib.contextmanager
def _whole_operators() -> Iterator[None]:
    """A build without CUDA decomposes these operators into steps.

    Each step makes a tensor: backward of LLaMA's activation would hold two more of
    them.
    """
    lacking = [
        name
        for name in WHOLE_OPERATORS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")
    ]
    with library._scoped_library("aten", "IMPL") as kernels:
        for name in lacking:
            kernels.impl(name, _never_run, "CUDA")
        yield


def _values(
    conditions: Conditions | None = None,
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Python code that reads a value gets True for a check and 0 for a number.

    What is false is in `conditions`. torch reads masks ("is there no padding?"), losses
    ("is it finite?") and scales; our code checks whether two tensors are equal.
    """

    known = conditions or Conditions()

    def _item(mode: Any, func: Any, tensor: Tensor) -> bool | float | int:
        if tensor.dtype is torch.bool:
            return known.read(tensor)
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _equal(mode: Any, func: Any, one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and one.dtype == other.dtype

    def _pin(mode: Any, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
        return torch.empty_like(tensor)

    def _is_pinned(mode: Any, func: Any, tensor: Tensor, device: Any = None) -> bool:
        return False

    yield mock.patch.dict(
        fake_impls.op_implementations_dict,
        {
            aten._local_scalar_dense.default: _item,
            aten.equal.default: _equal,
            aten._pin_memory.default: _pin,
            aten.is_pinned.default: _is_pinned,
        },
    )


def _initialisation() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Skip initialisation: a draw that is repeated until it is valid would never end.

    There are no values to draw, and transformers' own way to skip initialisation would
    also leave weights untied.
    """

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
    """`Module.to` swaps fake tensors, and refuses those with weak references.

    All fake tensors have weak references.
    """
    plain: Any = torch.utils.swap_tensors

    def swap(one: Any, other: Tensor) -> None:
        written = dict(vars(one))
        hooks = [*(one._post_accumulate_grad_hooks or {}).values()]
        with mock.patch.object(weakref, "getweakrefs", _none):
            plain(one, other)
        # A move keeps the attributes that other code has set on a parameter.
        vars(one).update({k: v for k, v in written.items() if k not in vars(one)})
        one._post_accumulate_grad_hooks = None
        for hook in hooks:
            one.register_post_accumulate_grad_hook(hook)

    yield mock.patch.object(torch.utils, "swap_tensors", swap)


def _no(*args: Any, **kwargs: Any) -> bool:
    return False


def _masks(
    has_padding: Callable[..., bool] = _no,
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """transformers treats fake tensors as tracing, and would always make a mask.

    It is right to do so where batches have padding.
    """
    masking = importlib.import_module("transformers.masking_utils")
    yield mock.patch.object(masking, "is_tracing", has_padding)


def _is_real(args: Sequence[object], kwargs: Mapping[str, Any]) -> bool:
    """Whether the inputs are real tensors and the result stays on the host.

    No input is fake when this is called.
    """
    device = kwargs.get("device")
    return (device is None or torch.device(device).type == "cpu") and any(
        isinstance(arg, Tensor)
        or (isinstance(arg, list | tuple) and any(isinstance(a, Tensor) for a in arg))
        for arg in args
    )


def _is_host_integer(
    func: Any, args: Sequence[object], kwargs: Mapping[str, Any]
) -> bool:
    """Whether integers or booleans are made on the host, from no tensor."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    if kwargs.get("out") is not None:
        return False
    packet = func._overloadpacket
    dtype = kwargs.get("dtype")
    if dtype is not None:
        is_whole = not dtype.is_floating_point and not dtype.is_complex
        return packet in (*WHOLE_NUMBERS, *FACTORIES) and is_whole
    numbers = args if packet is aten.arange else args[1:2]
    of_integers = packet in (aten.arange, aten.full) and all(
        isinstance(one, int) for one in numbers
    )
    return packet in WHOLE_NUMBERS or of_integers


def _is_host_scalar(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a single number is drawn on the host."""
    device = kwargs.get("device")
    return not args[0] and (device is None or torch.device(device).type == "cpu")


# Functions instead of mocks, because mocks keep references to their arguments.


def _stand_in_for_triton(device: torch.device) -> Any:
    return triton_stand_in


def _never_run(*args: Any) -> None:
    raise AssertionError("fake tensors come first")


def _none(*args: Any) -> list[Any]:
    return []
