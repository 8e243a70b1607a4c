"""Storage of one block's rows: master weights, Adam state and the transfer copy.

A row is a neuron, with key and value next to each other, so that one gather, one copy,
one gradient and one Adam step each use contiguous memory. Rows and both moments are
float32; if the transfer dtype has 16 bits, a 16-bit copy of the rows is kept in
addition. In host memory all of it is page-locked if there is a GPU to copy to.

The master rows are as of their last gradient (`meft.sparse.adam`). A read computes
their current values into memory of its own, or into the 16-bit copy, from which later
reads of the same value are plain gathers.

A store is no module and holds no parameter: `meft.sparse.row_parameter` creates one in
its memory.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meft import mapped_memory
from meft.errors import ConfigError, UnsupportedCallError
from meft.page_lock import page_locked
from meft.sparse import adam, idle
from meft.sparse.adam import RowTable
from meft.sparse.adam_on import adam_on
from meft.sparse.indices import all_ids, new_steps
from meft.sparse.schedule import Schedule
from meft.sparse.shapes import AllRows, Ids, SomeRows


class RowStore:
    """Rows of one block, with their optimizer state, on one device.

    Args:
        rows: the rows, float32, `rows width`, in the memory in which they are to be
            stored.
        transfer_dtype: the dtype of what `read()` returns.
        update: what happens to rows without a gradient (`SparseConfig.update`).
        folder: folder of the files in which everything of the size of the rows is
            kept; None for main memory.
    """

    bytes_per_row = 8 * idle.NUM_FACTORS + 16
    """Bytes stored per row in addition to its numbers."""

    def __init__(
        self,
        rows: AllRows,
        transfer_dtype: torch.dtype,
        update: str = "catchup",
        folder: str | None = None,
    ) -> None:
        self.folder, self._process = folder, os.getpid()
        # A GPU cannot copy from the memory of a file at once.
        self.rows = page_locked(rows) if folder is None else rows
        self.transfer_dtype = transfer_dtype
        is_wide = transfer_dtype == torch.float32
        self.shadow = None if is_wide else self._copy(rows, transfer_dtype)
        self._moments: tuple[Tensor, Tensor] | None = None
        self.updated_at = new_steps(len(rows), rows.device)
        """The last step that changed the value of each row."""
        self.shadow_at = new_steps(len(rows), rows.device)
        """The same for the value that the 16-bit copy holds."""
        self.factors = idle.new_factors(len(rows), rows.device)
        """Effect of the idle steps since each row's last gradient."""
        self._at_last: Tensor | None = None
        """Rows as of their last gradient, while `rows` holds current values."""
        self._life = 0
        """Number of times that rows were replaced by others."""
        self.schedule: Schedule | None = None
        """The optimizer's schedule; None before its first step."""
        self.update = update
        self.recall: Callable[[Ids | None], None] | None = None
        """Returns lent rows (None: all of them) by `take_back`; None if none are."""
        self.wait_for_upload: Callable[[], object] = _nothing
        """Waits until no part of the 16-bit copy is being uploaded (`span`)."""

    def __reduce__(self) -> Any:
        """Reduce to the current rows; a copy, also a saved one, has taken no steps."""
        of_rows = self.settled(), self.transfer_dtype, self.update
        return (RowStore if self.folder is None else in_folder), (
            of_rows if self.folder is None else (*of_rows, self.folder)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowStore":
        """Return a copy with the current rows: see `__reduce__`."""
        rows = self._copy(self.settled(), torch.float32)
        copied = RowStore(rows, self.transfer_dtype, self.update, self.folder)
        memo[id(self)] = copied
        return copied

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        """Return the numbers in a row: twice the backbone's width."""
        return self.rows.shape[1]

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the store."""
        held: list[Tensor | None]
        held = [self.rows, self.updated_at, self.shadow_at, self.factors]
        held += [self.shadow, self._at_last, *(self._moments or ())]
        return [tensor for tensor in held if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors of the store."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Return Adam's m and v, which are created on first access."""
        if self._moments is None:
            self._moments = self.zeros(), self.zeros()
        return self._moments

    def zeros(self, dtype: torch.dtype = torch.float32) -> AllRows:
        """Return zeros of the shape of the rows, in the kind of memory they are in."""
        # Tensors of an evaluation in inference mode could not be trained later.
        with torch.inference_mode(False):
            if self.folder is None:
                made = torch.zeros(
                    self.rows.shape, dtype=dtype, device=self.rows.device
                )
                return page_locked(made)
            return mapped_memory.zeros(tuple(self.rows.shape), dtype, self.folder)

    def _copy(self, rows: AllRows, dtype: torch.dtype) -> AllRows:
        return self.zeros(dtype).copy_(rows)

    def _refuse_shared(self) -> None:
        """Raise an error in a fork, which shares the memory of files with its parent.

        Raises:
            UnsupportedCallError: this process has not made the rows.
        """
        if self.folder is not None and os.getpid() != self._process:
            raise UnsupportedCallError(
                "rows in files (`SparseConfig.folder`) are shared by the process that "
                "made them and its forks, so that a change here would be one there, "
                "too: start processes by `spawn`, or load the model here"
            )

    def to(self, device: torch.device) -> None:
        """Move all tensors to `device`, unless they are there already."""
        if self.rows.device == device:
            return
        self._recall()
        for name in ("rows", "updated_at", "shadow_at", "factors"):
            setattr(self, name, getattr(self, name).to(device))
        if self.shadow is not None:
            self.shadow = self.shadow.to(device)
        if self._at_last is not None:
            self._at_last = self._at_last.to(device)
        if self._moments is not None:
            first, second = self._moments
            self._moments = first.to(device), second.to(device)

    def read(self, ids: Ids, out: SomeRows | None = None) -> SomeRows:
        """Return a copy of the current rows `ids`, in the transfer dtype.

        Args:
            ids: which rows, `some`.
            out: memory for the copy, `some width`; None for new memory.
        """
        self._recall(ids)
        if out is None:
            out = self.rows.new_empty(len(ids), self.width, dtype=self.transfer_dtype)
        if self.shadow is not None:
            self._renew_shadow(ids)
            return torch.index_select(self.shadow, 0, ids, out=out)
        if self._at_last is not None or self._moments is None:
            return torch.index_select(self.rows, 0, ids, out=out)
        places = torch.arange(len(ids), device=ids.device)
        self._adam().values(self._table(), ids, out, places)
        return out

    def span(self, ids: Ids) -> Float[Tensor, "span width"] | None:
        """Return the memory of the transfer copy from the first to the last of rows.

        It can be uploaded as it is. The caller sets `wait_for_upload`, which is called
        before these rows change. Only `ids` are current in it, and others may change
        during the upload.

        Args:
            ids: which rows, ascending, at least one, none of them lent.

        Returns:
            A view, or None if there is no such memory, or the rows fill less than
            `SPAN_SHARE` of it.
        """
        first, last = int(ids[0]), int(ids[-1])
        is_dense = len(ids) >= SPAN_SHARE * (last + 1 - first)
        # A GPU cannot copy from the memory of a file at once.
        if self.shadow is None or self.folder is not None or not is_dense:
            return None
        self._renew_shadow(ids)
        return self.shadow[first : last + 1]

    def keys(self) -> AllRows:
        """Return a view of all current keys, in the transfer dtype."""
        self._recall()
        if self.shadow is None:
            return self.settled()[:, : self.width // 2]
        self._renew_shadow(self._everyone())
        return self.shadow[:, : self.width // 2]

    def settled(self) -> AllRows:
        """Update all master rows and return `rows`, current until the next step.

        Their values after the last gradient are kept separately until then, so that
        later steps do not depend on whether this method was called.
        """
        self._recall()
        if self._at_last is None and len(self._behind()):
            self._refuse_shared()
            at_last = self._copy(self.rows, torch.float32)
            everyone = self._everyone()
            self._adam().values(self._table(), everyone, self.rows, everyone)
            self._at_last = at_last
        return self.rows

    def assign(self, rows: AllRows) -> None:
        """Set all rows, which may be what `settled()` returned; moments stay.

        Rows that are set to their current value do not change.
        """
        self._refuse_shared()
        if rows is not self.rows:
            self.settled()
            self.rows.copy_(rows)
        self._restart_changed()
        self._life += 1
        self._fill_shadow()

    def version(self, ids: Ids) -> Int[Tensor, " some"]:
        """Return a number per row that changes whenever its value does."""
        return self.updated_at[ids] + self._life * _STEPS_OF_A_LIFE

    def begin(self) -> None:
        """Discard every step, before another optimizer takes its first."""
        self.settled()
        self._start_again()
        self.schedule = None

    def step(
        self, ids: Ids, gradient: SomeRows, lent: Int[Tensor, " lent"] | None = None
    ) -> None:
        """Take the schedule's last step.

        The new values of idle rows are computed at once (`dense`) or when they are
        needed.

        Args:
            ids: the rows with a gradient, `some`, of which none is lent.
            gradient: their gradient, float32, `some width`.
            lent: the lent rows with a gradient; None for none.
        """
        assert self.schedule is not None
        self._refuse_shared()
        self._unsettle()
        self.wait_for_upload()
        table = self._table(self.shadow)
        is_idle = self.update != "lazy"
        self._adam().advance(table, ids, gradient, self.schedule, idle=is_idle)
        self.shadow_at[ids] = self.schedule.step
        if lent is not None:
            adam.restart_moved(table, lent, self.schedule, idle=is_idle)
        if self.update == "dense" and self.shadow is not None:
            self._renew_shadow(self._everyone())

    def due(self, ids: Ids) -> Int[Tensor, " due"]:
        """Return which of these rows have to be settled in the schedule's last step.

        Args:
            ids: rows that have no gradient in this step, which is not taken yet.
        """
        if self.update == "lazy" or not len(ids):
            return ids[:0]
        found: Ids = self._adam().due(self._table(), ids, self.schedule)
        return found

    def lend(self, ids: Ids, out: Float[Tensor, "3 some width"]) -> None:
        """Copy p, m and v of rows, which change elsewhere until they are taken back.

        Args:
            ids: which rows, `some`, not lent yet.
            out: memory for the copy.
        """
        table = self._table()
        for one, whole in zip(out, (table.rows, *self.moments), strict=True):
            torch.index_select(whole, 0, ids, out=one)

    def take_back(self, ids: Ids, states: Float[Tensor, "3 some width"]) -> None:
        """Store p, m and v of rows that were lent.

        Args:
            ids: which rows, `some`.
            states: p, m and v as of each row's last gradient.
        """
        self._refuse_shared()
        table = self._table()
        for one, whole in zip(states, (table.rows, *self.moments), strict=True):
            whole[ids] = one
        self.shadow_at[ids] = -1

    def state(self) -> dict[str, Any]:
        """Return what a later run needs besides the rows to continue bit for bit.

        For rows that have taken idle steps since their last gradient, this includes
        their values at that time.
        """
        self._recall()
        first, second = self.moments
        behind = self._behind()
        rows = self.rows if self._at_last is None else self._at_last
        return {
            "update": self.update,
            "first": first,
            "second": second,
            "updated_at": self.updated_at,
            "factors": self.factors,
            "behind": behind,
            "at_last": rows[behind],
            "schedule": None if self.schedule is None else asdict(self.schedule),
        }

    def refuse(self, state: dict[str, Any]) -> None:
        """Raise an error if `state` does not match this store.

        Raises:
            ConfigError: `state` was saved by an earlier release, with another `update`,
                or of rows of another shape.
        """
        if not {"update", "factors"} <= state.keys():
            raise ConfigError(
                "the state was saved by an earlier release of meft, which kept other "
                "things in the optimizer's state: load the rows by "
                "`meft.load_adapters()` and start with a new optimizer"
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
        """Load what `state()` returned, after `refuse()` has checked it.

        The rows themselves are not part of it. Where they have the values they had when
        the state was created, training continues with the same bits; elsewhere it
        continues from the rows' values, with the moments of the state.
        """
        self.settled()
        first, second = self.moments
        for mine, name in (
            (first, "first"),
            (second, "second"),
            (self.updated_at, "updated_at"),
            (self.factors, "factors"),
        ):
            mine.copy_(state[name])
        schedule = state["schedule"]
        self.schedule = None if schedule is None else Schedule(**schedule)
        self._at_last = None
        if len(state["behind"]):
            self._at_last = self._copy(self.rows, torch.float32)
            behind = state["behind"].to(self.rows.device)
            self._at_last[behind] = state["at_last"].to(self.rows.device)
            self._restart_changed()
        self._life += 1
        self._fill_shadow()

    def replace(self, rows: AllRows) -> None:
        """Replace the rows by others, without any effect of earlier steps."""
        self._refuse_shared()
        self._recall()
        self.rows.copy_(rows)
        self._start_again()

    def _start_again(self) -> None:
        """Reset the optimizer state, keeping the rows."""
        self._at_last = self._moments = None
        self._life += 1
        self.updated_at.zero_()
        self.factors.copy_(idle.new_factors(len(self), self.factors.device))
        self._fill_shadow()

    def _recall(self, ids: Ids | None = None) -> None:
        """Take lent rows back: all, or those of `ids`."""
        if self.recall is not None:
            self.recall(ids)

    def _behind(self) -> Ids:
        """Return the rows that have changed since their last gradient."""
        if self._moments is None:
            return self._everyone()[:0]
        shrunk = self.factors[:, idle.SHRINK] != 1
        return (shrunk | (self.factors[:, idle.SUMS] != 0)).nonzero()[:, 0]

    def _restart_changed(self) -> None:
        """Start the factors of rows again whose value in `rows` was changed."""
        if self._at_last is None or self.schedule is None:
            return
        for ids in self._everyone().split(adam.PIECE):
            was = self.rows.new_empty(len(ids), self.width)
            places = torch.arange(len(ids), device=ids.device)
            self._adam().values(self._table(), ids, was, places)
            changed = ids[(was != self.rows[ids]).any(1)]
            adam.restart(self._table(), changed, self.schedule)
            self._at_last[changed] = self.rows[changed]

    def _unsettle(self) -> None:
        """Restore the values of rows after their last gradient."""
        if self._at_last is not None:
            self.rows.copy_(self._at_last)
            self._at_last = None

    def _renew_shadow(self, ids: Ids) -> None:
        """Write current rows into their 16-bit copy, where that is out of date."""
        assert self.shadow is not None
        late = ids[self.shadow_at[ids] != self.updated_at[ids]]
        if not len(late):
            return
        self._refuse_shared()
        if self._at_last is not None or self._moments is None:
            self.shadow[late] = self.rows[late].to(self.shadow.dtype)
        else:
            self._adam().values(self._table(), late, self.shadow, late)
        self.shadow_at[late] = self.updated_at[late]

    def _fill_shadow(self) -> None:
        """Write all current rows into their 16-bit copy."""
        self.wait_for_upload()
        self.shadow_at.fill_(-1)
        if self.shadow is not None:
            self._renew_shadow(self._everyone())

    def _everyone(self) -> Ids:
        return all_ids(len(self), self.rows.device)

    def _table(self, shadow: Tensor | None = None) -> RowTable:
        first, second = self.moments
        return RowTable(
            rows=self.rows if self._at_last is None else self._at_last,
            first=first,
            second=second,
            factors=self.factors,
            updated_at=self.updated_at,
            shadow=shadow,
        )

    def _adam(self) -> Any:
        return adam_on(self.rows.device)


def in_folder(
    rows: AllRows, transfer_dtype: torch.dtype, update: str, folder: str
) -> RowStore:
    """Return a store of rows whose memory is files; arguments are those of `RowStore`.

    Raises:
        HostMemoryError: see `mapped_memory.zeros`.
    """
    mapped = mapped_memory.zeros(tuple(rows.shape), torch.float32, folder)
    return RowStore(mapped.copy_(rows), transfer_dtype, update, folder)


def _nothing() -> None:
    """Wait for no upload."""


SPAN_SHARE = 7 / 8
"""Share of the rows of a span that have to be wanted to upload all of it.

A gather of a share s of n bytes at a rate G before an upload at a rate L takes s n / G
+ s n / L, the upload of all n / L, which is less for s > G / (G + L): at this share
unless the host gathers seven times as fast as the link transfers.
"""
_STEPS_OF_A_LIFE = 2**40
"""More steps than a run can have, so that versions of replaced rows differ."""
