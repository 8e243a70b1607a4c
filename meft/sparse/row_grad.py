"""`RowGrad`: the gradient of a table of rows in which only some rows have a gradient.

It has the shape of the table and behaves like the dense gradient, in which rows without
a gradient are 0. It stores only the values of the other rows, in a *holder*:

    Live    what backwards have added since gradients were last cleared, kept by `Rows`
    Held    tensors of its own: a clone, or the result of an operation

Norms and operations that map 0 to 0 (scaling, clipping, unscaling) run on these values,
on the device where they are. Every other operation runs on the dense gradient, which is
created for it on the device of the parameter, and written back if it was changed. Views
are refused, because a write to a view of the dense gradient would be lost.

A `RowGrad` reports the device of its parameter, as autograd requires of a gradient,
although the gradient values of rows in host memory stay on the device that computed
them.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

from meft.errors import UnsupportedCallError
from meft.sparse.division import Division
from meft.sparse.rows import Holder, Rows
from meft.sparse.shapes import AllRows, Ids, SomeRows

aten = torch.ops.aten


@dataclass(slots=True)
class Held(Holder):
    """Gradients in tensors that are not referenced elsewhere."""

    ids: list[Tensor]
    values: list[Tensor]
    division: Division | None = None

    @override
    def held_ids(self) -> list[Tensor]:
        return self.ids

    @override
    def parts(self) -> list[Tensor]:
        return [part.clone() for part in self.values]

    @override
    def put_parts(self, parts: list[Tensor]) -> None:
        self.values = parts

    @override
    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device)

    @override
    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self.ids, self.values = [ids], [gradient]

    @override
    def drop_gradient(self) -> None:
        self.ids, self.values = [], []


class Live(Holder):
    """Gradients that `rows` hold until they drop them; a copy of them afterwards.

    If a caller keeps a reference to `parameter.grad` and then sets it to None, the
    values are preserved, as with any parameter.
    """

    def __init__(self, rows: Rows) -> None:
        self._holder: Holder = rows
        rows.live = weakref.ref(self)
        self.division = rows.division

    @override
    def held_ids(self) -> list[Tensor]:
        return self._holder.held_ids()

    @override
    def parts(self) -> list[Tensor]:
        return self._holder.parts()

    @override
    def put_parts(self, parts: list[Tensor]) -> None:
        self._holder.put_parts(parts)

    @override
    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        return self._holder.bring(tensor, device)

    @override
    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self._holder.replace_gradient(ids, gradient)

    @override
    def drop_gradient(self) -> None:
        self._holder.drop_gradient()

    def copy_from_rows(self) -> None:
        """Copy the values before the rows drop them."""
        ids = [each.clone() for each in self._holder.held_ids()]
        self._holder = Held(ids, self._holder.parts(), self.division)


def live_of(rows: Rows) -> Live | None:
    """Return the holder of the gradients of `rows`, or None if there is none."""
    return None if rows.live is None else rows.live()


def forget(rows: Rows) -> None:
    """Make `rows` drop their gradient, as their parameter has another one or none."""
    live = live_of(rows)
    if live is not None:
        live.copy_from_rows()
    rows.live = None
    rows.drop_gradient()


class RowGrad(torch.Tensor):
    """Gradient of a table of rows: see the module's docstring.

    Args:
        holder: the values; None for the mark that a backward returns to autograd, which
            means that it has added its gradient to the holder itself.
        shape: shape of the table.
        device: device of the parameter.
    """

    holder: Holder | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, holder: Holder | None, shape: Sequence[int], device: torch.device
    ) -> "RowGrad":
        """Create a tensor without memory of its own."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.float32, device=device
        )
        made.holder = holder
        return made

    def to_dense(self, *args: Any, **kwargs: Any) -> AllRows:
        """Return a copy as an ordinary tensor, on the device of the parameter."""
        whole = torch.zeros(tuple(self.shape), device=self.device)
        holder = self._holder()
        for ids, part in zip(holder.held_ids(), holder.parts(), strict=True):
            whole[ids] = holder.bring(part, whole.device)
        return whole

    def numpy(self, *, force: bool = False) -> Any:
        """Return the dense gradient; changes to it do not affect this gradient."""
        return self.to_dense().numpy(force=force)

    def tolist(self) -> Any:
        """Return the dense gradient as nested lists."""
        return self.to_dense().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Return the shape and the number of rows that have a gradient."""
        if self.holder is None:
            return f"RowGrad(shape={tuple(self.shape)}, added where it is held)"
        count = sum(len(ids) for ids in self.holder.held_ids())
        return f"RowGrad(shape={tuple(self.shape)}, rows with a gradient: {count})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowGrad":
        """Return a copy with its own values."""
        copied = memo[id(self)] = self.clone()
        return cast(RowGrad, copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Serialize as the dense gradient."""
        return self.to_dense().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handle every operation that has a `RowGrad` among its arguments."""
        # Operations within are dispatched as usual again, also for active dispatch
        # modes.
        with torch.no_grad(), enable_reentrant_dispatch():
            return cls._dispatch(func, args, kwargs or {})

    @classmethod
    def _dispatch(cls, func: Any, args: Any, kwargs: Any) -> Any:
        name, first = func.overloadpacket, args[0] if args else None
        if any(_is_mark(leaf) for leaf in tree_leaves((args, kwargs))):
            return _with_mark(name, args)
        if isinstance(first, RowGrad):
            if name in (aten.detach, aten.alias):
                return first._like(first.holder)
            if name is aten.zero_:
                first._holder().drop_gradient()
                return first
            if name is aten.linalg_vector_norm and _is_whole_norm(args, kwargs):
                return first._norm(float(args[1] if len(args) > 1 else 2))
            if name is aten.sum and len(args) == 1 and not kwargs:
                return first._sum()
            if name in _IN_PLACE and _keeps_zero(name, args, kwargs):
                first._change(func, args, kwargs)
                return first
            if name in _COPYING and _keeps_zero(name, args, kwargs):
                return first._map(func, args, kwargs)
        elif isinstance(first, list | tuple):
            done = _of_list(func, name, args, kwargs)
            if done is not None:
                return done[0]
        return _dense(func, args, kwargs)

    def _holder(self) -> Holder:
        if self.holder is None:
            _refuse_mark()
        return self.holder

    def _parts(self) -> list[Tensor]:
        return self._holder().parts()

    def _like(self, holder: Holder | None) -> "RowGrad":
        return RowGrad(holder, self.shape, self.device)

    def _norm(self, order: float) -> Tensor:
        # Computed in float64, so that it does not depend on how rows are divided into
        # parts.
        holder = self._holder()
        norms = [
            torch.linalg.vector_norm(piece.double(), order)
            for part in holder.parts()
            for piece in part.view(-1).split(_norm_piece(part.device))
            if piece.numel()
        ]
        if not norms and holder.division is None:
            return torch.zeros((), device=self.device)
        total = torch.zeros((), dtype=torch.double)
        if norms:
            together = [holder.bring(n, norms[0].device) for n in norms]
            total = _norm_of_norms(torch.stack(together), order)
        if holder.division is not None:
            total = _norm_of_norms(holder.division.gather(total), order)
        return total.float()

    def _sum(self) -> Tensor:
        holder = self._holder()
        total: Tensor = sum((p.sum() for p in holder.parts()), torch.zeros(()))
        division = holder.division
        return total if division is None else division.gather(total).sum()

    def _change(self, func: Any, args: Any, kwargs: Any) -> None:
        holder = self._holder()
        parts = holder.parts()
        for part in parts:
            func(part, *_near(holder, args[1:], part), **kwargs)
        holder.put_parts(parts)

    def _map(self, func: Any, args: Any, kwargs: Any) -> "RowGrad":
        holder = self._holder()
        values = [
            func(part, *_near(holder, args[1:], part), **kwargs)
            for part in holder.parts()
        ]
        ids = [each.clone() for each in holder.held_ids()]
        return self._like(Held(ids, values, holder.division))


def _norm_of_norms(norms: Tensor, order: float) -> Tensor:
    if order == 0:  # counts of elements
        return norms.sum()
    total: Tensor = torch.linalg.vector_norm(norms, order)
    return total


def _norm_piece(device: torch.device) -> int:
    """Return how many numbers of a norm are converted to 8 bytes each at a time.

    On a CPU they stay in its cache: a sixth of the time. A GPU needs fewer kernels.
    """
    return 2**16 if device.type == "cpu" else 2**22


_IN_PLACE = (
    aten.mul_,
    aten.div_,
    aten.neg_,
    aten.abs_,
    aten.clamp_,
    aten.clamp_min_,
    aten.clamp_max_,
)
_COPYING = (
    aten.mul,
    aten.div,
    aten.neg,
    aten.abs,
    aten.clamp,
    aten.clamp_min,
    aten.clamp_max,
    aten.clone,
)
_OF_LISTS = {
    aten._foreach_mul_: aten.mul_,
    aten._foreach_div_: aten.div_,
    aten._foreach_clamp_min_: aten.clamp_min_,
    aten._foreach_clamp_max_: aten.clamp_max_,
    aten._foreach_zero_: aten.zero_,
    aten._foreach_neg_: aten.neg_,
    aten._foreach_norm: aten.linalg_vector_norm,
}
"""Operations on a list that apply one operation to each of its tensors."""


def _keeps_zero(name: Any, args: Any, kwargs: Any) -> bool:
    """Return whether 0 stays 0, and every other operand is a single number."""
    if any(isinstance(a, Tensor) and a.numel() != 1 for a in args[1:]):
        return False
    if any(isinstance(a, RowGrad) for a in args[1:]) or "out" in kwargs:
        return False
    if name in (aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_):
        low = args[1] if len(args) > 1 else kwargs.get("min")
        if low is not None and low > 0:
            return False
    if name in (aten.clamp, aten.clamp_):
        high = args[2] if len(args) > 2 else kwargs.get("max")
        return high is None or bool(high >= 0)
    if name in (aten.clamp_max, aten.clamp_max_):
        return bool(args[1] >= 0)
    return True


def _is_whole_norm(args: Any, kwargs: Any) -> bool:
    """Return whether a norm is over all elements and unaffected by zero rows."""
    order = args[1] if len(args) > 1 else 2
    return order >= 0 and len(args) < 3 and not any(kwargs.values())


def _near(holder: Holder, operands: Sequence[Any], part: Tensor) -> list[Any]:
    # The factor of clipping is a number of FSDP2 if other gradients are sharded.
    operands = [o.full_tensor() if hasattr(o, "full_tensor") else o for o in operands]
    return [
        holder.bring(operand, part.device) if _is_far(operand, part) else operand
        for operand in operands
    ]


def _is_far(operand: Any, part: Tensor) -> bool:
    if not isinstance(operand, Tensor) or operand.device == part.device:
        return False
    # A number on the host is an argument of the kernel.
    return operand.ndim > 0 or operand.device.type != "cpu"


def _of_list(
    func: Any, name: Any, args: Any, kwargs: Any
) -> tuple[list[Tensor] | None] | None:
    """Run an operation on a list; return None if it is not one of those above.

    Args:
        func: the operation.
        name: its overload packet.
        args: its positional arguments; the first is the list.
        kwargs: its keyword arguments.

    Returns:
        The result in a tuple, so that it differs from None.
    """
    tensors, rest = args[0], args[1:]
    if name is aten._amp_foreach_non_finite_check_and_unscale_:
        _unscale(func, *args)
        return (None,)
    one = _OF_LISTS.get(name)
    if one is None or any(isinstance(a, list | tuple) for a in rest):
        return None
    plain = [tensor for tensor in tensors if not isinstance(tensor, RowGrad)]
    others = func(plain, *rest, **kwargs) if plain else []
    if not func._schema.is_mutable:
        results = iter(others)
        return (
            [
                one(t, *rest) if isinstance(t, RowGrad) else next(results)
                for t in tensors
            ],
        )
    for tensor in tensors:
        if isinstance(tensor, RowGrad):
            one(tensor, *rest)
    return (None,)


def _unscale(func: Any, tensors: Any, found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Unscale gradients for a loss scaler, and record non-finite values."""
    plain = [tensor for tensor in tensors if not isinstance(tensor, RowGrad)]
    if plain:
        func(plain, found_inf, inverse_scale)
    for tensor in tensors:
        if not isinstance(tensor, RowGrad):
            continue
        holder = tensor._holder()
        parts = holder.parts()
        for part in parts:
            if part.device == found_inf.device:
                func([part], found_inf, inverse_scale)
                continue
            found = torch.zeros_like(found_inf, device=part.device)
            func([part], found, holder.bring(inverse_scale, part.device))
            found_inf.copy_(found_inf.maximum(holder.bring(found, found_inf.device)))
        holder.put_parts(parts)
        if holder.division is not None:  # all processes skip the step, or none
            found_inf.copy_(holder.division.gather(found_inf).amax(0))


def _dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run any other operation on the dense gradients."""
    if func.is_view:
        raise UnsupportedCallError(
            f"`{func}` of the gradient of a sparse adapter's rows would be a view of a "
            "copy, and writes to it would be lost. To read, take `grad.to_dense()`; to "
            "write, assign the changed tensor to `parameter.grad`"
        )
    made: dict[int, tuple[RowGrad, Tensor]] = {}

    def dense(grad: RowGrad) -> Tensor:
        if id(grad) not in made:
            made[id(grad)] = grad, grad.to_dense()
        return made[id(grad)][1]

    new_args, new_kwargs = tree_map_only(RowGrad, dense, (args, kwargs))
    out = func(*new_args, **new_kwargs)
    for grad in written(func, args, kwargs, RowGrad):
        replace_dense(grad._holder(), made[id(grad)][1])
    original = {id(whole): grad for grad, whole in made.values()}
    return tree_map_only(Tensor, lambda t: original.get(id(t), t), out)


def replace_dense(holder: Holder, dense: AllRows) -> None:
    """Set the gradient of `holder` to the rows of `dense` that are not all 0."""
    ids = (dense != 0).any(1).nonzero()[:, 0]
    holder.replace_gradient(ids, dense[ids])


def written(func: Any, args: Any, kwargs: Any, kind: type) -> list[Any]:
    """Return the arguments of a class that an operation changes in place.

    Args:
        func: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        kind: the class.
    """
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, kind)]
    return found


# A mark means that a backward has added its gradient to the holder.


def _is_mark(value: Any) -> bool:
    return isinstance(value, RowGrad) and value.holder is None


def _with_mark(name: Any, args: Any) -> RowGrad:
    """Handle autograd's own sums; all other operations on a mark are refused."""
    grads = [a for a in args if isinstance(a, RowGrad)]
    if name in (aten.detach, aten.alias, aten.clone):
        return grads[0]._like(None)
    if name in (aten.add, aten.add_) and len(grads) == 2:
        real = next((g for g in grads if g.holder is not None), grads[0])
        return grads[0] if name is aten.add_ else real._like(real.holder)
    _refuse_mark()


def _refuse_mark() -> NoReturn:
    raise UnsupportedCallError(
        "the gradient of a sparse adapter's rows can be read only once it has been "
        "added up: after `backward()` as `parameter.grad`, or in a hook of "
        "`parameter.register_post_accumulate_grad_hook`"
    )
