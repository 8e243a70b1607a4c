"""Record every storage that a piece of code allocates, on any device, fake or real.

    with Ledger() as ledger:
        ledger.watch(model, optimizer)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    ledger.trace().peak("cuda").by_kind

One dispatch mode intercepts every operator. A storage is allocated with the first
tensor that uses it and freed when nothing refers to it any more. `location` determines
the phase and the module of an operator.
"""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from meft.sparse.row_grad import RowGrad
from meft.sparse.row_parameter import RowTensor
from meft_bench.virtual.device.allocator import ROUND_BYTES
from meft_bench.virtual.device.blocks import Block
from meft_bench.virtual.device.workspaces import MULTIPLY, WITH_BIAS, Workspace
from meft_bench.virtual.recording import collectives, copies, work
from meft_bench.virtual.recording.gradient_accumulation import is_accumulation
from meft_bench.virtual.recording.live_memory import LiveMemory
from meft_bench.virtual.recording.location import Location
from meft_bench.virtual.recording.replay import describe
from meft_bench.virtual.recording.tensors import (
    device_of,
    is_distributed,
    is_fake,
    local,
    parts_of,
    tensors_in,
)
from meft_bench.virtual.recording.trace import (
    BACKWARD,
    RecordedCopy,
    Storage,
    StorageEvent,
    Trace,
    in_order,
)

aten = torch.ops.aten
ADD = aten.add.Tensor
DEVICE_OF = torch.ops.prim.device.default


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""Key of the kernels of operators that consist of others."""


_name = functools.cache(str)
"""Returns the name of an operator or a dtype."""


@functools.cache
def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key.split(".")[-1])


class Ledger(TorchDispatchMode):
    """Record all storages that are allocated in the context.

    Args:
        workspaces: functions that compute the workspace of a kernel in bytes, by
            operator.
        round_bytes: granularity of the storage sizes in a peak.
        accelerator: type of the device whose copies to and from the host are recorded.
        library_bytes: bytes that cuBLAS and cuBLASLt keep on the device for each thread
            that multiplies matrices.
        memory: serves the requests on the accelerator as they are recorded.
        cuda_stream: returns the number of the stream that is current.
    """

    def __init__(
        self,
        workspaces: Mapping[Any, Workspace] | None = None,
        round_bytes: int = ROUND_BYTES,
        accelerator: str = "cuda",
        library_bytes: tuple[int, int] = (0, 0),
        memory: LiveMemory | None = None,
        cuda_stream: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = 0
        """Number of optimizer steps so far."""
        self.flops: Counter[str] = Counter()
        """Floating-point operations of matrix products and attention, by phase."""
        self.touched: Counter[str] = Counter()
        """Bytes of the device that operators read and write, by phase."""
        self.touched_by_host: Counter[str] = Counter()
        """Bytes of host memory that operators and copies read and write, by phase."""
        self._workspaces = workspaces or {}
        self._round_bytes = round_bytes
        self._accelerator = accelerator
        self._library_bytes = library_bytes
        self._memory = memory
        self._cuda_stream = cuda_stream
        self._is_paused = False
        self._libraries: set[tuple[str, bool]] = set()
        self._location = Location()
        self._time = 0
        self._storages: list[Storage] = []
        self._events: list[StorageEvent] = []
        self._copies: list[RecordedCopy] = []
        self._alive: dict[int, Storage] = {}
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._handles: list[Any] = []
        self._num_updating = 0
        # Weak, as code that drops a model frees its memory.
        self._models: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._watches_all = False
        self.num_trainable_parameters = 0
        """Most parameters that were trained at a time, of models that are watched."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Report that this mode does not change the results of operators."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The wrapper around the dispatch costs time and hides the caller, the engine.
        return False

    # Kinds of storages, as given by the caller.

    def watch(self, model: nn.Module, *optimizers: Optimizer) -> None:
        """Distinguish weights, gradients and optimizer state from other storages."""
        self._models.append(weakref.ref(model))
        self._optimizers += [weakref.ref(one) for one in optimizers]
        self._handles += self._location.name_modules(model)
        self._tell_kinds()

    def watch_all(self) -> None:
        """Watch every model from its first call, and every optimizer at its steps.

        A model is a module that is called outside of any module that is watched.
        """
        self._watches_all = True
        self._handles.append(register_module_forward_pre_hook(self._meet))

    def _meet(self, module: nn.Module, args: Any) -> None:
        if not self._location.is_named(module):
            self.watch(module)
            self._location.enter(module, args)

    def trace(self) -> Trace:
        """Return what has been recorded so far."""
        self._tell_kinds()
        return Trace(
            storages=tuple(self._storages),
            events=tuple(in_order(self._events)),
            copies=tuple(self._copies),
            round_bytes=self._round_bytes,
            accelerator=self._accelerator,
        )

    @property
    def time(self) -> int:
        """Number of operators so far."""
        return self._time

    @property
    def num_events(self) -> int:
        """Number of allocations and frees so far."""
        return len(self._events)

    def mark(self) -> int:
        """Return a time that separates all events so far from all later ones."""
        self._time += 1
        return self._time

    def __enter__(self) -> Self:
        self._location.phase = "forward"
        self._handles += [
            register_optimizer_step_pre_hook(self._begin_update),
            register_optimizer_step_post_hook(self._end_update),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._tell_kinds()
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def add_unattributed(self, allocated_bytes: int) -> None:
        """Record the memory of a real GPU that belongs to no storage seen so far.

        Libraries keep workspaces, and a script its own tensors.

        Args:
            allocated_bytes: what the allocator of the accelerator holds now.
        """
        sizes = [
            -(-storage.num_bytes // self._round_bytes) * self._round_bytes
            for storage in self._alive.values()
            if storage.device == self._accelerator
        ]
        if (rest := allocated_bytes - sum(sizes)) > 0:
            self._add_kept(rest, "unattributed", operator="", phase="")

    # Interception of operators.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and record the storages of its outputs."""
        if func is DEVICE_OF and is_fake(args[0]):  # more than half of all calls
            return args[0].fake_device
        if any([_consists_of_others(kind) for kind in types]):
            return NotImplemented  # its operators are intercepted individually
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            # Without autograd, operators that consist of others arrive as a whole.
            if _has_kernel(func.name(), str(COMPOSITE)):
                with self._entered_again():
                    return func._op_dk(COMPOSITE, *args, **kwargs)
        if func is DEVICE_OF:
            return args[0].device
        if func is ADD and not kwargs and is_accumulation(args):
            # As autograd does without the ledger; fake tensors have nothing to add.
            return args[0] if is_fake(args[0]) else args[0].add_(args[1])
        self._time += 1
        if func._overloadpacket in MULTIPLY:
            self._keep_workspaces(func, args)
        out = func(*args, **kwargs)
        made = [*tensors_in(out)]
        given = [*tensors_in(args), *tensors_in([*kwargs.values()])]
        is_of_host = self._is_of_host(made, given)
        phase = self._location.present_phase()
        if not is_of_host:
            self.flops[phase] += work.num_flops(func, args, kwargs, out)
        if not func.is_view:
            for tensor, size in work.traffic(func, made, given):
                self._touched_by(tensor)[phase] += size
        for tensor in made:
            self.see(tensor, func)
        workspace = None if is_of_host else self._workspaces.get(func)
        if workspace is not None and (num_bytes := workspace(args, out)):
            try:
                self._add(self._birth(None, num_bytes))
            finally:
                self._add(StorageEvent(self._time, None, num_bytes, is_birth=False))
        self._record_copy(func, args, kwargs, out)
        for tensor, kind in collectives.kinds_of(func, args, kwargs):
            self._tell(tensor, kind, "")
        return out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in the context, for operators that a GPU does not run."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextlib.contextmanager
    def _entered_again(self) -> Iterator[None]:
        """Record the operators inside an operator, without a new beginning."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def add_host_traffic(self, num_bytes: int) -> None:
        """Count bytes that code without operators reads and writes on the host."""
        self.touched_by_host[self._location.present_phase()] += num_bytes

    def _touched_by(self, tensor: Tensor) -> Counter[str]:
        """Return the count of the memory that a tensor is in."""
        is_here = self._memory is None or device_of(tensor) == self._accelerator
        return self.touched if is_here else self.touched_by_host

    def _is_of_host(self, made: list[Tensor], given: list[Tensor]) -> bool:
        """Return whether an operator runs next to an accelerator that exists."""
        if self._memory is None:
            return False
        some = itertools.chain(made, given)
        return all(device_of(tensor) != self._accelerator for tensor in some)

    def see(self, tensor: Tensor, func: Any = None) -> Storage | None:
        """Record the storage of `tensor` and return it; return None if it has none.

        Args:
            tensor: any tensor; its storage may be known already.
            func: the operator that made it; None if unknown.
        """
        if tensor.layout is not torch.strided or isinstance(tensor, RowGrad):
            return None
        memory = tensor.untyped_storage()
        known = self._alive.get(memory._cdata)
        if known is not None and known.num_bytes == memory.nbytes():
            return known
        # A view allocates nothing: what it shows was there before the recording.
        is_older = known is None and func is not None and func.is_view
        phase = "inputs" if is_older else self._location.present_phase()
        storage = Storage(
            index=len(self._storages),
            num_bytes=memory.nbytes(),
            device=device_of(tensor),
            operator="" if func is None else _name(func),
            module=self._location.present_module(phase),
            phase=phase,
            step=self.step,
            shape=tuple(tensor.shape),
            dtype=_name(tensor.dtype).removeprefix("torch."),
            born=self._time,
        )
        self._begin(storage, memory, known)
        return storage

    def changed(self, memory: torch.UntypedStorage, device: str | None = None) -> None:
        """Record that a storage has another size or device, without an operator.

        Args:
            memory: the storage; one that is not known has no effect.
            device: type of its device, to which it is copied from the host; None if it
                is as before.
        """
        known = self._alive.get(memory._cdata)
        if known is not None:
            storage = dataclasses.replace(
                known,
                index=len(self._storages),
                num_bytes=memory.nbytes(),
                device=device or known.device,
                born=self._time,
            )
            self._begin(storage, memory, known)
            if device == self._accelerator:
                self._add_copy("h2d", storage.num_bytes)

    def _begin(self, storage: Storage, memory: Any, before: Storage | None) -> None:
        """Record the allocation of a storage.

        Args:
            storage: its description.
            memory: the storage itself.
            before: its description before it changed, None for a new one. Its
                memory is freed after it was copied to the new one.
        """
        key = memory._cdata
        self._storages.append(storage)
        self._alive[key] = storage
        self._deaths[storage.index] = weakref.ref(
            memory, lambda _: self._bury(storage, key)
        )
        event = self._birth(storage.index, storage.num_bytes)
        try:
            self._add(event)
        except torch.OutOfMemoryError:
            self._forget(event, key)
            if before is not None:
                self._alive[key] = before
            raise
        if before is not None:
            self._bury(before, key)

    def _forget(self, event: StorageEvent, key: int) -> None:
        """Remove the allocation of a storage that there was no room for."""
        assert event.storage is not None
        storage = self._storages[event.storage]
        storage.num_bytes, storage.died = 0, storage.born
        self._events.remove(event)
        del self._alive[key], self._deaths[storage.index]

    def _birth(self, index: int | None, num_bytes: int) -> StorageEvent:
        """Return an allocation at this moment; `index` is None for a workspace."""
        return StorageEvent(self._time, index, num_bytes, True, self._cuda_stream())

    def _add(self, event: StorageEvent) -> None:
        """Record an event, and serve it if it is one of the accelerator."""
        self._events.append(event)
        if self._memory is None:
            return
        if event.storage is not None:
            if self._storages[event.storage].device != self._accelerator:
                return
        self._memory.serve(event, self._describe)

    def _describe(
        self, event: StorageEvent, blocks: dict[int | None, Block | None]
    ) -> str:
        return describe(self.trace(), event, blocks)

    def _keep_workspaces(self, func: Any, args: tuple[Any, ...]) -> None:
        """Record the workspaces that libraries keep from a thread's first product."""
        if device_of(args[0]) != self._accelerator:
            return
        # Autograd has its own thread, in which checkpoints are also recomputed.
        phase = self._location.present_phase()
        thread = "backward" if phase in BACKWARD else "forward"
        wanted = [(thread, False)] + [(thread, True)] * (
            func._overloadpacket in WITH_BIAS
        )
        for one in wanted:
            num_bytes = self._library_bytes[one[1]]
            if not num_bytes or one in self._libraries:
                continue
            self._libraries.add(one)
            self._add_kept(num_bytes, "libraries", operator=str(func), phase=phase)

    def _add_kept(self, num_bytes: int, kind: str, operator: str, phase: str) -> None:
        """Record memory of the accelerator that no tensor has and nothing frees."""
        storage = Storage(
            index=len(self._storages),
            num_bytes=num_bytes,
            device=self._accelerator,
            operator=operator,
            module="",
            phase=phase,
            step=self.step,
            shape=(num_bytes,),
            dtype="uint8",
            born=self._time,
            kind=kind,
        )
        self._storages.append(storage)
        self._add(self._birth(storage.index, num_bytes))

    def _bury(self, storage: Storage, key: int) -> None:
        if self._alive.get(key) is storage:
            del self._alive[key]
        self._deaths.pop(storage.index, None)
        storage.died = self._time
        self._add(
            StorageEvent(self._time, storage.index, storage.num_bytes, is_birth=False)
        )

    def _begin_update(self, optimizer: Optimizer, *_: Any) -> None:
        if self._watches_all:
            if all(one() is not optimizer for one in self._optimizers):
                self._optimizers.append(weakref.ref(optimizer))
        # An optimizer's step may call the step of another, with its own hooks.
        self._num_updating += 1
        self._tell_kinds()
        self._location.phase = "update"

    def _end_update(self, *_: Any) -> None:
        self._num_updating -= 1
        self._tell_kinds()
        if not self._num_updating:
            self._location.phase = "forward"
            self.step += 1

    @torch.inference_mode(False)
    def _tell_kinds(self) -> None:
        owners: dict[Tensor, str] = {}
        trained: dict[int, int] = {}
        for model in _alive(self._models):
            for name, parameter in model.named_parameters():
                owners[parameter] = owner = name.rpartition(".")[0]
                kind = "parameters" if parameter.requires_grad else "frozen"
                if parameter.requires_grad:
                    trained[id(parameter)] = parameter.numel()
                self._tell(local(parameter).detach(), kind, owner)
                if parameter.grad is not None:
                    self._tell(parameter.grad, "gradients", owner)
            for name, buffer in model.named_buffers():
                self._tell(buffer, "buffers", name.rpartition(".")[0])
        most = max(self.num_trainable_parameters, sum(trained.values()))
        self.num_trainable_parameters = most
        for optimizer in _alive(self._optimizers):
            for of, state in optimizer.state.items():
                for value in state.values():
                    parts = parts_of(value) if isinstance(value, Tensor) else []
                    for part in parts:
                        self._tell(part, "optimizer", owners.get(of, ""))

    def _tell(self, tensor: Tensor, kind: str, owner: str) -> None:
        if is_functorch_wrapped_tensor(tensor):
            return  # a model runs inside `torch.func`, where tensors have no storage
        storage = self.see(local(tensor))
        if storage is not None:
            storage.kind = kind
            storage.module = storage.module or owner

    def _record_copy(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        found = copies.between_devices(func, args, kwargs, out, self._accelerator)
        if found is not None:
            self._add_copy(*found)

    def _add_copy(self, direction: str, num_bytes: int) -> None:
        phase = self._location.present_phase()
        module = self._location.present_module(phase)
        self._copies.append(
            RecordedCopy(self._time, direction, num_bytes, phase, module)
        )


def _consists_of_others(kind: type) -> bool:
    """Return whether operators of a class of tensors are those of its parts."""
    return issubclass(kind, RowTensor | RowGrad) or is_distributed(kind)


def _alive(references: "list[weakref.ref[Any]]") -> list[Any]:
    """Return what is still referred to elsewhere, in order."""
    return [one for reference in references if (one := reference()) is not None]
