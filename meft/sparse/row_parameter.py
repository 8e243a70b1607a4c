"""`RowParameter`: the rows of one block as a parameter.

Its memory is that of the store, wherever that is: moving the model or changing its
dtype does not change it. Rows may be outdated, because idle rows take their steps
later, and copies of rows may be on a device. An operation that reads the parameter
therefore updates all rows first, and an operation that writes it invalidates every copy
afterwards. Views of the parameter, `detach()`, `data` and the tensors that
`state_dict()` returns do the same.

Its gradient is a `RowGrad`. A backward adds to the gradient in `Rows` piece by piece
and returns a mark to autograd in place of a gradient:

    forward    begin_forward(parameter)       its result depends on the parameter
    backward   begin_backward(ctx, ...)       synchronize `parameter.grad`, which may
                                              have been cleared or replaced, with the
                                              gradient in `Rows`
               rows.add_gradient(...)
               return mark(parameter)         then `parameter.grad` is a `RowGrad` of
                                              the gradient in `Rows`
"""

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from meft.errors import UnsupportedCallError
from meft.sparse.row_grad import (
    Live,
    RowGrad,
    forget,
    live_of,
    replace_dense,
    written,
)
from meft.sparse.row_mean import average
from meft.sparse.rows import Rows
from meft.transforms import in_backward

TRAIN_WITH = (
    "`meft.SparseAdamW(model.parameters(), lr=...)`, or with transformers' Trainer "
    "`Trainer(..., optimizer_cls_and_kwargs=meft.optimizer_cls_and_kwargs(args))`"
)


class RowTensor(torch.Tensor):
    """The memory of rows, or a view of it, which is updated before it is read."""

    rows: Rows

    @staticmethod
    def of(rows: Rows, plain: Tensor) -> "RowTensor":
        """Return `plain`, which is memory of the store, as a `RowTensor`."""
        made: RowTensor = torch.Tensor._make_subclass(RowTensor, plain, False)
        made.rows = rows
        return made

    def settled(self) -> Tensor:
        """Return an ordinary tensor in the same memory, with current values."""
        return _like(self, self.rows.store.settled())

    @property
    def data(self) -> Tensor:
        """Return the detached tensor, as for any tensor; assigning to it copies."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.detach().copy_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """Return a read-only copy, because a write to it would not reach the rows.

        Raises:
            RuntimeError: without `force`, if the tensor requires a gradient or is on
                another device, as for any tensor.
        """
        if self.requires_grad and not force:
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. Use "
                "tensor.detach().numpy() instead."
            )
        found = self.settled().detach().clone().numpy(force=force)
        found.flags.writeable = False
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Convert to an array for numpy's own functions."""
        return np.asarray(self.numpy(), dtype)

    def tolist(self) -> Any:
        """Return the numbers as nested lists."""
        return self.settled().tolist()

    def data_ptr(self) -> int:
        """Return the address of the memory after updating all rows."""
        return self.settled().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage after updating all rows."""
        return self.settled().untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        """Export a copy, because a write to it would not reach the rows."""
        return self.settled().detach().clone().__dlpack__(**kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Return the representation of the current values, as for any tensor."""
        return f"{type(self).__name__}({self.settled().detach()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a copy as an ordinary tensor."""
        copied = memo[id(self)] = self.settled().detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialize as an ordinary tensor."""
        return self.settled().detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function so that its results are ordinary tensors."""
        if func is torch.autograd.grad and not in_backward():
            raise UnsupportedCallError(
                "`torch.autograd.grad` cannot return the gradient of the rows of a "
                "sparse adapter: call `backward()` and read `parameter.grad`, or leave "
                "the rows out of `inputs`"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handle every operation on rows."""
        # Operations within are dispatched as usual again, also for active dispatch
        # modes.
        with torch.no_grad(), enable_reentrant_dispatch():
            return cls._dispatch(func, args, kwargs or {})

    @classmethod
    def _dispatch(cls, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        every = {id(t.rows): t.rows for t in leaves if isinstance(t, RowTensor)}
        stores = {key: rows.store for key, rows in every.items()}
        # A view is updated when it is read, not when it is created.
        memory = {
            key: store.rows if func.is_view else store.settled()
            for key, store in stores.items()
        }

        def plain(tensor: RowTensor) -> Tensor:
            return _like(tensor, memory[id(tensor.rows)])

        new_args, new_kwargs = tree_map_only(RowTensor, plain, (args, kwargs))
        out = func(*new_args, **new_kwargs)
        if func.is_view:
            (rows,) = every.values()
            return tree_map_only(Tensor, lambda view: _view(rows, view), out)
        changed = written(func, args, kwargs, RowTensor)
        for key in {id(tensor.rows) for tensor in changed}:
            stores[key].assign(memory[key])
            every[key].invalidate()
        if not changed or out is None:
            return out
        # In-place operations return the tensor that they changed.
        return changed[0] if isinstance(out, Tensor) else args[0]


def _view(rows: Rows, plain: Tensor) -> RowTensor:
    if plain.dtype != torch.float32:
        raise UnsupportedCallError(
            f"the rows of sparse adapters cannot be viewed as {plain.dtype}: `clone()` "
            "them first"
        )
    return RowTensor.of(rows, plain)


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """Return the part of `memory` with the strides and offset of `tensor`."""
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class RowParameter(RowTensor, nn.Parameter):
    """Parameter of rows: see the module's docstring. `row_parameter` creates it."""

    process_group: Any = None
    """Processes over which gradients are averaged (`meft.sparse.ranks`)."""

    def register_hook(self, hook: Any) -> Any:
        """Raise an error, because the gradient does not pass through autograd.

        Raises:
            UnsupportedCallError: always.
        """
        raise UnsupportedCallError(
            "`register_hook` is not supported by the rows of sparse adapters, whose "
            "gradient is added up without passing through autograd: use "
            "`register_post_accumulate_grad_hook`, which may change `parameter.grad`"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return a copy with its own rows and without optimizer state."""
        rows = copy.deepcopy(self.rows, memo)
        made = memo[id(self)] = row_parameter(rows, self.requires_grad)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialize as the rows from which the parameter can be created again."""
        return row_parameter, (self.rows, self.requires_grad)


def row_parameter(rows: Rows, requires_grad: bool = True) -> nn.Parameter:
    """Create the parameter of `rows`, in the memory of their store.

    Returns:
        A `RowParameter`; an ordinary parameter if the memory is not that of an ordinary
        tensor, as under `FakeTensorMode`. Either has `rows` as an attribute.
    """
    _refuse_other_optimizers()
    # `data` has its own version counter, which late updates of rows do not increment.
    memory = rows.store.rows.data
    parameter: Any
    if type(memory) is Tensor:
        parameter = torch.Tensor._make_subclass(RowParameter, memory, True)
    else:
        parameter = nn.Parameter(memory)
    parameter.rows = rows
    # Registered for frozen rows too, which may be unfrozen later.
    parameter.register_post_accumulate_grad_hook(_after_backward)
    return cast(nn.Parameter, parameter.requires_grad_(requires_grad))


def rows_of(parameter: Tensor) -> Rows | None:
    """Return the rows of a row parameter; None for any other tensor."""
    # The class is not checked, because a tensor without values has another class.
    return getattr(parameter, "rows", None)


def begin_forward(parameter: Tensor, rows: Rows, *, is_training: bool) -> None:
    """Refuse unsupported parameters, and drop the gradient if it was cleared.

    Args:
        parameter: the parameter of the rows.
        rows: the rows.
        is_training: whether the module is in training mode.

    Raises:
        UnsupportedCallError: the parameter was replaced, or there is more than one
            process and gradients are not averaged.
    """
    if rows_of(parameter) is not rows:
        raise UnsupportedCallError(
            "the parameter of a sparse adapter's rows was replaced by another tensor "
            f"({type(parameter).__name__}), which the adapter does not use: copy "
            "values into it instead, by `load_state_dict(...)` or "
            "`parameter.copy_(...)`. Sharding and `torch.func.functional_call` are not "
            "supported: leave rows out of FSDP2 by `fully_shard(..., "
            "ignored_params=rows)`, and divide them by `meft.divide_rows(model)`"
        )
    may_train = is_training or torch.is_grad_enabled()
    group = getattr(parameter, "process_group", None)
    is_alone = group is None and rows.division is None
    if may_train and is_alone and _is_distributed():
        raise UnsupportedCallError(
            "sparse adapters train in one process unless gradients of their rows are "
            "averaged between processes: call `meft.average_row_gradients(model)`, or "
            "`meft.divide_rows(model)` to keep a share of the rows in each, in every "
            "process, after `meft.add_sparse_adapters()`"
        )
    memory = rows.store.rows
    if memory.device != parameter.device:
        moved: Any = memory.data
        if isinstance(parameter, RowParameter):
            moved = RowTensor.of(rows, moved)
        grad, parameter.grad = parameter.grad, None
        setter: Any = torch.Tensor.data
        setter.__set__(parameter, moved)
        if isinstance(grad, RowGrad):
            grad = RowGrad(grad.holder, grad.shape, memory.device)
        parameter.grad = grad
    if not in_backward():
        rows.is_settled = False
        if parameter.grad is None:
            forget(rows)


def begin_backward(ctx: Any, parameter: nn.Parameter, version: int) -> bool:
    """Prepare to add to the gradient.

    Args:
        ctx: the context of the autograd function that has the parameter as an input.
        parameter: the parameter of the rows.
        version: the version of the parameter in the forward.

    Returns:
        Whether this backward needs the gradient of the rows.

    Raises:
        UnsupportedCallError: the rows were changed since the forward.
    """
    if parameter._version != version:
        raise UnsupportedCallError(
            "the rows of a sparse adapter were changed between forward and backward "
            "(an optimizer step, or an in-place update): run the backward first"
        )
    node = next(
        (n for n, _ in ctx.next_functions if getattr(n, "variable", None) is parameter),
        None,
    )
    if node is None or not _is_wanted(node):
        return False
    rows = rows_of(parameter)
    assert rows is not None
    if not rows.is_settled:
        rows.is_settled = True
        settle(parameter)
    return True


def settle(parameter: nn.Parameter) -> None:
    """Copy `parameter.grad` to the rows, if it was replaced."""
    rows, grad = rows_of(parameter), parameter.grad
    assert rows is not None
    if grad is None:
        forget(rows)
        return
    if not isinstance(grad, RowGrad) or grad.holder is None:
        forget(rows)
        replace_dense(rows, grad.float())
    elif grad.holder is not live_of(rows):
        home = rows.store.rows.device
        ids, parts = grad.holder.held_ids(), grad.holder.parts()
        forget(rows)
        if parts:
            values = torch.cat([rows.bring(part, home) for part in parts])
            rows.replace_gradient(torch.cat(ids).to(home), values)
    else:
        return
    parameter.grad = RowGrad(Live(rows), parameter.shape, parameter.device)


def mark(parameter: nn.Parameter) -> RowGrad:
    """Return the mark of a backward whose gradient has been added to the holder."""
    return RowGrad(None, parameter.shape, parameter.device)


def _after_backward(parameter: Any) -> None:
    parameter.rows.is_settled = False
    parameter.rows.reduce()
    grad, live = parameter.grad, live_of(parameter.rows)
    if live is None or not isinstance(grad, RowGrad) or grad.holder is not live:
        live = live or Live(parameter.rows)
        parameter.grad = RowGrad(live, parameter.shape, parameter.device)
    group = getattr(parameter, "process_group", None)
    if group is not None:
        average(live, parameter.rows.store.rows, group)


def _is_wanted(node: Any) -> bool:
    """Return whether the running backward needs the gradient of a leaf."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        # The leaf is an input of a `torch.autograd.grad` inside a backward, whose
        # caller passes the result to autograd.
        return True


def _is_distributed() -> bool:
    group = torch.distributed
    return (
        group.is_available() and group.is_initialized() and group.get_world_size() > 1
    )


_is_refusing = False


def _refuse_other_optimizers() -> None:
    """Register a hook that checks every optimizer before its step, once per process."""
    global _is_refusing
    if not _is_refusing:
        register_optimizer_step_pre_hook(_refuse_other_optimizer)
        _is_refusing = True


def _refuse_other_optimizer(optimizer: Optimizer, *_: Any) -> None:
    if getattr(optimizer, "steps_rows", False):
        return
    if any(rows_of(p) is not None for g in optimizer.param_groups for p in g["params"]):
        raise UnsupportedCallError(
            f"{type(optimizer).__name__} cannot train the rows of sparse adapters, and "
            f"has not changed any parameter. Train all parameters with {TRAIN_WITH}"
        )
