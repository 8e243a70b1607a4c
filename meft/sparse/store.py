"""The home of one block's rows: master weights, Adam state, and what travels.

A row is a neuron, key and value side by side, so that one gather, one copy, one
gradient and one Adam step are each of contiguous memory. Rows and both moments are
float32; where the wire carries 16 bits, a 16-bit copy of the rows is kept beside them.
In host memory all of it is page-locked if there is a GPU to copy to.

A store is no module and holds no parameter: `meft.sparse.row_parameter` makes one in
its memory.
"""

import importlib.util
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meft.errors import ConfigError, MeftError
from meft.sparse import adam
from meft.sparse.adam import Schedule, Table

Width = Float[Tensor, "rows width"]
SomeRows = Float[Tensor, "some width"]
Ids = Int[Tensor, " some"]


class RowStore:
    """Rows of one block, with their optimizer state, in one place.

    Args:
        rows: float32, in the memory that they are to live in.
        wire_dtype: of what `read()` gives.
        update: what happens to rows without a gradient (`SparseConfig.update`).
    """

    def __init__(
        self, rows: Width, wire_dtype: torch.dtype, update: str = "catchup"
    ) -> None:
        self.rows = _pinned(rows)
        self.wire_dtype = wire_dtype
        is_wide = wire_dtype == torch.float32
        self.shadow = None if is_wide else _pinned(rows.to(wire_dtype))
        self._moments: tuple[Tensor, Tensor] | None = None
        self.updated_at = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        """The step that each row stands at."""
        self.schedule: Schedule | None = None
        """The optimizer's, once there is one."""
        self.update = update

    def __reduce__(self) -> Any:
        """A copy, also a saved one, has the rows as they are now, and no steps."""
        return RowStore, (self.settled(), self.wire_dtype, self.update)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowStore":
        """See `__reduce__`."""
        copied = RowStore(self.settled().clone(), self.wire_dtype, self.update)
        memo[id(self)] = copied
        return copied

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Numbers in a row: twice the backbone's width."""
        return self.rows.shape[1]

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        held = [self.rows, self.updated_at, self.shadow, *(self._moments or ())]
        return [tensor for tensor in held if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's m and v, made when first asked for."""
        if self._moments is None:
            self._moments = (
                _pinned(torch.zeros_like(self.rows)),
                _pinned(torch.zeros_like(self.rows)),
            )
        return self._moments

    def to(self, device: torch.device) -> None:
        """Move everything; nothing to do where it is there already."""
        if self.rows.device == device:
            return
        self.rows, self.updated_at = self.rows.to(device), self.updated_at.to(device)
        if self.shadow is not None:
            self.shadow = self.shadow.to(device)
        if self._moments is not None:
            first, second = self._moments
            self._moments = first.to(device), second.to(device)

    def read(self, ids: Ids) -> SomeRows:
        """Rows as they are now, in the wire's dtype: a copy."""
        self.catch_up(ids)
        source = self.rows if self.shadow is None else self.shadow
        return source.index_select(0, ids)

    def keys(self) -> Width:
        """All keys as they are now, in the wire's dtype: a view."""
        self.catch_up(None)
        source = self.rows if self.shadow is None else self.shadow
        return source[:, : self.width // 2]

    def settled(self) -> Width:
        """All master rows as they are now."""
        self.catch_up(None)
        return self.rows

    def version(self, ids: Ids) -> Int[Tensor, " some"]:
        """A number per row that changes whenever its value does."""
        stands_at = self.updated_at[ids]
        if self.schedule is None or self.update == "lazy":
            return stands_at
        moves = (stands_at > 0) | self.schedule.decays
        return stands_at.masked_fill(moves, self.schedule.step)

    def begin(self) -> None:
        """Forget every step: another optimizer is about to take its first."""
        self.catch_up(None)
        self.schedule = None
        self.updated_at.zero_()
        self._moments = None

    def step(self, ids: Ids, gradient: SomeRows) -> None:
        """Take the schedule's last step with a float32 gradient for rows `ids`."""
        if self.update == "dense":
            everything = torch.arange(len(self), device=self.rows.device)
            whole = torch.zeros_like(self.rows)
            whole[ids] = gradient
            self._advance(everything, whole)
        else:
            self._advance(ids, gradient)

    def catch_up(self, ids: Ids | None) -> None:
        """Let rows (None: all) take the idle steps that they have put off."""
        if self.schedule is None or self.update != "catchup":
            return
        stands_at = self.updated_at if ids is None else self.updated_at[ids]
        behind = (stands_at < self.schedule.step) & (
            (stands_at > 0) | self.schedule.decays
        )
        if behind.any():
            late = behind.nonzero()[:, 0]
            self._advance(late if ids is None else ids[late], None)

    def assign(self, rows: Width) -> None:
        """Set all rows, which may be what `settled()` returned; moments stay."""
        if rows is not self.rows:
            self.rows.copy_(rows)
        self._write_shadow(slice(None))

    def state(self) -> dict[str, Any]:
        """What a later run needs, beside the rows, to go on in the same bits."""
        self.catch_up(None)
        first, second = self.moments
        return {
            "update": self.update,
            "first": first,
            "second": second,
            "updated_at": self.updated_at,
            "schedule": None if self.schedule is None else asdict(self.schedule),
        }

    def refuse(self, state: dict[str, Any]) -> None:
        """Raise if `state` is not of a store like this one."""
        if "update" not in state:
            raise ConfigError(
                "the state was saved by an earlier release of meft, which kept rows in "
                "the optimizer's state: load the rows by `meft.load_adapters()` and "
                "start with a new optimizer"
            )
        given, mine = tuple(state["first"].shape), tuple(self.rows.shape)
        if (state["update"] == "lazy") != (self.update == "lazy"):
            raise ConfigError(
                f"the state was saved with update={state['update']!r}, but this model "
                f"has update={self.update!r}: what `lazy` does to idle rows cannot be "
                "continued otherwise. Take `SparseConfig(update=...)` of the saved run"
            )
        if given != mine:
            raise ConfigError(
                f"the state is of {given[0]} rows of {given[1]} numbers, but this "
                f"model's blocks have {mine[0]} of {mine[1]}"
            )

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state()`."""
        self.catch_up(None)
        first, second = self.moments
        for mine, name in (
            (first, "first"),
            (second, "second"),
            (self.updated_at, "updated_at"),
        ):
            mine.copy_(state[name])
        schedule = state["schedule"]
        self.schedule = None if schedule is None else Schedule(**schedule)

    def replace(self, rows: Width) -> None:
        """Take other rows, which no step so far moves."""
        self.rows.copy_(rows)
        # At 0 they would catch up on the weight decay of every step so far.
        self.updated_at.fill_(0 if self.schedule is None else self.schedule.step)
        self._moments = None
        self._write_shadow(slice(None))

    def _write_shadow(self, ids: Ids | slice) -> None:
        if self.shadow is not None:
            self.shadow[ids] = self.rows[ids].to(self.shadow.dtype)

    def _advance(self, ids: Ids, gradient: SomeRows | None) -> None:
        assert self.schedule is not None
        first, second = self.moments
        table = Table(
            rows=self.rows, first=first, second=second, updated_at=self.updated_at
        )
        function = _advance_function(self.rows.device)
        function(table, ids, gradient, self.schedule, idle=self.update != "lazy")
        self._write_shadow(ids)


def _advance_function(device: torch.device) -> Callable[..., None]:
    if device.type != "cpu":
        return adam.advance
    if importlib.util.find_spec("numba") is None:
        warnings.warn(
            "numba is not installed: rows of sparse adapters take their steps many "
            "times slower. `pip install 'meft[sparse]'`",
            stacklevel=5,
        )
        return adam.advance
    from meft.sparse import adam_kernel

    return adam_kernel.advance


def _pinned(tensor: Tensor) -> Tensor:
    """The same memory, page-locked where that is of use.

    torch's own pinned allocator rounds every block up to a power of two; registering
    ordinary memory does not.
    """
    if tensor.is_cuda or not torch.cuda.is_available() or tensor.numel() == 0:
        return tensor
    tensor, runtime = tensor.contiguous(), torch.cuda.cudart()
    code = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    storage = tensor.untyped_storage()
    weakref.finalize(storage, runtime.cudaHostUnregister, tensor.data_ptr())
    if int(code) != 0:
        raise MeftError(
            f"{tensor.nbytes} bytes of host memory could not be page-locked (CUDA "
            f"error {int(code)}): free host memory or take fewer `num_neurons`"
        )
    return tensor
