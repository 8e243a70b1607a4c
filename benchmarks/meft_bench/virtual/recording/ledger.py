"""Record every storage that a piece of code allocates, on any device, fake or real.

    with Ledger() as ledger:
        ledger.watch(model, optimizer)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    ledger.trace().peak("cuda").by_kind

One dispatch mode intercepts every operator. A storage is allocated with the first
tensor that uses it and freed when nothing refers to it any more. Forward, backward,
recompute and update are distinguished by querying autograd, and modules by their hooks;
the operators of backward are attributed to the module whose forward created the node.
"""

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from meft.sparse.row_grad import RowGrad
from meft.sparse.row_parameter import RowTensor
from meft_bench.virtual.device.allocator import ROUND_BYTES
from meft_bench.virtual.device.workspaces import MULTIPLY, WITH_BIAS, Workspace
from meft_bench.virtual.recording.gradient_accumulation import is_accumulation
from meft_bench.virtual.recording.trace import (
    BACKWARD,
    RecordedCopy,
    Storage,
    StorageEvent,
    Trace,
)

aten = torch.ops.aten
ADD = aten.add.Tensor
DEVICE_OF = torch.ops.prim.device.default
COPIES = (aten.copy_.default, aten._to_copy.default)
ATTENTION = {
    aten._scaled_dot_product_flash_attention: 0,
    aten._scaled_dot_product_efficient_attention: 0,
    aten._scaled_dot_product_cudnn_attention: 0,
    aten._scaled_dot_product_flash_attention_backward: 1,
    aten._scaled_dot_product_efficient_attention_backward: 1,
    aten._scaled_dot_product_cudnn_attention_backward: 1,
}
"""Attention kernels, and the index of the query among their arguments.

The key and the value follow the query.
"""
LAST_NODE = 1 << 60
"""Lower bound of the numbers of nodes that accumulate into leaves."""


class Ledger(TorchDispatchMode):
    """Record all storages that are allocated in the context.

    Args:
        workspaces: functions that compute the workspace of a kernel in bytes, by
            operator.
        round_bytes: granularity of the storage sizes in a peak.
        accelerator: type of the device whose copies to and from the host are recorded.
        library_bytes: bytes that cuBLAS and cuBLASLt keep on the device for each thread
            that multiplies matrices.
    """

    def __init__(
        self,
        workspaces: Mapping[Any, Workspace] | None = None,
        round_bytes: int = ROUND_BYTES,
        accelerator: str = "cuda",
        library_bytes: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = 0
        """Number of optimizer steps so far."""
        self.num_flops = 0
        """Number of floating-point operations of matrix products and attention so far.
        """
        self.bytes_touched = 0
        """Bytes read and written by operators so far, derived from their tensors."""
        self._workspaces = workspaces or {}
        self._round_bytes = round_bytes
        self._accelerator = accelerator
        self._library_bytes = library_bytes
        self._libraries: set[tuple[str, bool]] = set()
        self._phase = "inputs"
        self._time = 0
        self._storages: list[Storage] = []
        self._events: list[StorageEvent] = []
        self._copies: list[RecordedCopy] = []
        self._alive: dict[int, Storage] = {}
        self._deaths: dict[int, weakref.ref[Any]] = {}
        self._names: dict[nn.Module, str] = {}
        self._modules: list[str] = []
        self._first_nodes: list[int] = []
        self._module_of_node: list[str] = []
        self._handles: list[Any] = []
        self._num_updating = 0
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []

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
        self._models.append(model)
        self._optimizers.extend(optimizers)
        if not self._names:
            # Global hooks, because a model that runs some modules in parts refuses
            # hooks on these, which would never be called.
            self._handles += [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]
        self._names |= {module: name for name, module in model.named_modules()}
        self._tell_kinds()

    def trace(self) -> Trace:
        """Return what has been recorded so far."""
        self._tell_kinds()
        return Trace(
            storages=tuple(self._storages),
            events=tuple(_in_order(self._events)),
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
        self._phase = "forward"
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

    # Interception of operators.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and record the storages of its outputs."""
        if any(issubclass(kind, RowTensor | RowGrad) for kind in types):
            return NotImplemented  # its operators are intercepted individually
        if func is DEVICE_OF:
            return args[0].fake_device if _is_fake(args[0]) else args[0].device
        if func is ADD and not kwargs and is_accumulation(args):
            # As autograd does without the ledger; fake tensors have nothing to add.
            return args[0] if _is_fake(args[0]) else args[0].add_(args[1])
        kwargs = kwargs or {}
        self._time += 1
        if func in MULTIPLY:
            self._keep_workspaces(func, args)
        out = func(*args, **kwargs)
        self._count_work(func, args, kwargs, out)
        for tensor in _tensors(out):
            self.see(tensor, func)
        workspace = self._workspaces.get(func)
        if workspace is not None and (num_bytes := workspace(args, out)):
            self._events += [
                StorageEvent(self._time, None, num_bytes, is_birth=True),
                StorageEvent(self._time, None, num_bytes, is_birth=False),
            ]
        if func in COPIES:
            self._count_copy(func, args, out)
        return out

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
        if known is not None:
            return known
        phase = self._present_phase()
        storage = Storage(
            index=len(self._storages),
            num_bytes=memory.nbytes(),
            device=_device_of(tensor),
            operator="" if func is None else str(func),
            module=self._present_module(phase),
            phase=phase,
            step=self.step,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            born=self._time,
        )
        self._storages.append(storage)
        self._alive[memory._cdata] = storage
        key = memory._cdata
        self._deaths[storage.index] = weakref.ref(
            memory, lambda _: self._bury(storage, key)
        )
        self._events.append(
            StorageEvent(self._time, storage.index, storage.num_bytes, is_birth=True)
        )
        return storage

    def _keep_workspaces(self, func: Any, args: tuple[Any, ...]) -> None:
        """Record the workspaces that libraries keep from a thread's first product."""
        if _device_of(args[0]) != self._accelerator:
            return
        # Autograd has its own thread, in which checkpoints are also recomputed.
        phase = self._present_phase()
        thread = "backward" if phase in BACKWARD else "forward"
        wanted = [(thread, False)] + [(thread, True)] * (func in WITH_BIAS)
        for one in wanted:
            num_bytes = self._library_bytes[one[1]]
            if not num_bytes or one in self._libraries:
                continue
            self._libraries.add(one)
            storage = Storage(
                index=len(self._storages),
                num_bytes=num_bytes,
                device=self._accelerator,
                operator=str(func),
                module="",
                phase=phase,
                step=self.step,
                shape=(num_bytes,),
                dtype="uint8",
                born=self._time,
                kind="libraries",
            )
            self._storages.append(storage)
            self._events.append(
                StorageEvent(self._time, storage.index, num_bytes, is_birth=True)
            )

    def _bury(self, storage: Storage, key: int) -> None:
        if self._alive.get(key) is storage:
            del self._alive[key]
        self._deaths.pop(storage.index, None)
        storage.died = self._time
        self._events.append(
            StorageEvent(self._time, storage.index, storage.num_bytes, is_birth=False)
        )

    # Location and time.

    def _present_phase(self) -> str:
        if self._phase != "forward":
            return self._phase
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _present_module(self, phase: str) -> str:
        if phase == "backward":
            node = torch._C._current_autograd_node()
            number = LAST_NODE if node is None else node._sequence_nr()
            place = bisect_right(self._first_nodes, number) - 1
            if place < 0 or number >= LAST_NODE:
                return ""
            return self._module_of_node[place]
        return self._modules[-1] if self._modules else ""

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._modules.append(self._names[module])
            self._mark_nodes()

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if module not in self._names:
            return
        if self._modules:
            self._modules.pop()
        self._mark_nodes()

    def _mark_nodes(self) -> None:
        """Attribute nodes that are created from now on to the current module."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        name = self._modules[-1] if self._modules else ""
        if self._first_nodes and self._first_nodes[-1] >= number:
            self._module_of_node[-1] = name
        else:
            self._first_nodes.append(number)
            self._module_of_node.append(name)

    def _begin_update(self, *_: Any) -> None:
        # An optimizer's step may call the step of another, with its own hooks.
        self._num_updating += 1
        self._tell_kinds()
        self._phase = "update"

    def _end_update(self, *_: Any) -> None:
        self._num_updating -= 1
        self._tell_kinds()
        if not self._num_updating:
            self._phase = "forward"
            self.step += 1

    def _tell_kinds(self) -> None:
        owners: dict[Tensor, str] = {}
        for model in self._models:
            for name, parameter in model.named_parameters():
                owners[parameter] = owner = name.rpartition(".")[0]
                kind = "parameters" if parameter.requires_grad else "frozen"
                self._tell(parameter.detach(), kind, owner)
                if parameter.grad is not None:
                    self._tell(parameter.grad, "gradients", owner)
            for name, buffer in model.named_buffers():
                self._tell(buffer, "buffers", name.rpartition(".")[0])
        for optimizer in self._optimizers:
            for of, state in optimizer.state.items():
                for value in state.values():
                    if isinstance(value, Tensor):
                        self._tell(value, "optimizer", owners.get(of, ""))

    def _tell(self, tensor: Tensor, kind: str, owner: str) -> None:
        storage = self.see(tensor)
        if storage is not None:
            storage.kind = kind
            storage.module = storage.module or owner

    # Amounts of work.

    def _count_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.num_flops += formula(*_all_heads(func, args), **kwargs, out_val=out)
        if not func.is_view:
            tensors = [
                *_tensors(args),
                *_tensors(list(kwargs.values())),
                *_tensors(out),
            ]
            self.bytes_touched += sum(t.numel() * t.element_size() for t in tensors)

    def _count_copy(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        source, target = (args[0], out) if func is COPIES[1] else (args[1], args[0])
        pair = _device_of(source), _device_of(target)
        if pair[0] == pair[1]:
            return
        there = self._accelerator
        direction = {("cpu", there): "h2d", (there, "cpu"): "d2h"}.get(pair)
        if direction is None:
            return
        # A change of dtype happens on the device, for both directions.
        on_host = source if direction == "h2d" else target
        num_bytes = source.numel() * on_host.element_size()
        phase = self._present_phase()
        self._copies.append(
            RecordedCopy(
                self._time, direction, num_bytes, phase, self._present_module(phase)
            )
        )


def _all_heads(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return attention's arguments with as many key and value heads as query heads.

    The formulas of PyTorch before 2.13 do not support heads that queries share.
    """
    first = ATTENTION.get(func._overloadpacket)
    if first is None:
        return args
    heads = args[first].shape[1]
    shapes = [
        torch.Size((t.shape[0], heads, *t.shape[2:])) for t in args[first : first + 3]
    ]
    return (*args[:first], *shapes, *args[first + 3 :])


def _is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)


def _device_of(tensor: Tensor) -> str:
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _in_order(events: list[StorageEvent]) -> Iterator[StorageEvent]:
    """Yield events with consecutive frees sorted by storage.

    The cache of autocast is a hash map over addresses, which differ in every process,
    and frees its entries in its own order.
    """
    row: list[StorageEvent] = []
    for event in events:
        if event.storage is not None and not event.is_birth:
            row.append(event)
            continue
        yield from sorted(row, key=lambda e: (e.time, e.storage))
        row.clear()
        yield event
    yield from sorted(row, key=lambda e: (e.time, e.storage))
