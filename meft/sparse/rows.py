"""The interface between an adapter and its rows, wherever these are stored.

    choose(h, k)             return the k best neurons of each token, all scored
    chosen(flags)            start to find out which neurons a batch uses
    prepare(ids)             announce the rows that one pass over a batch takes
    take(ids)                return current rows, on the device
    add_gradient(ids, g)     add to the gradient that is kept until it is cleared
    reduce()                 exchange it with other processes, after a backward pass
    parts(), put_parts()     read and change that gradient in the memory it is in
    gradient(), step(ids, g) start the transfer of that gradient to the optimizer, and
                             take a step with it

`ResidentRows` keeps rows in the device's own memory and is the plain twin of
`meft.sparse.offloaded_rows`: the two differ in copies only, not in arithmetic, so both
give the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from meft.sparse.division import Division
from meft.sparse.indices import ids_of
from meft.sparse.router import top
from meft.sparse.shapes import Ids, SomeRows
from meft.sparse.store import RowStore

Tokens = Float[Tensor, "tokens hidden"]
Kept = Int[Tensor, "tokens kept"]
"""The neurons that each token keeps."""


@runtime_checkable
class Holder(Protocol):
    """Gradients of some rows of a table."""

    division: Division | None
    """The processes that each have the gradient of some rows; None for this alone."""

    def held_ids(self) -> list[Tensor]:
        """Return the rows with a gradient, per part, on the device of the store."""

    def parts(self) -> list[Tensor]:
        """Return float32 copies of the gradients, one per memory that has some."""

    def put_parts(self, parts: list[Tensor]) -> None:
        """Replace the gradients by tensors in the form that `parts()` returns."""

    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of the optimizer or of the user on `device`."""

    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        """Replace the gradient; float32, both arguments on the store's device."""

    def drop_gradient(self) -> None:
        """Drop all that `add_gradient` has added."""


@runtime_checkable
class Rows(Holder, Protocol):
    """The rows of one block."""

    store: RowStore
    """Storage of the rows."""
    is_settled: bool
    """Whether the running backward has compared this gradient with the parameter's."""
    live: Callable[[], Any] | None
    """Weak reference to the `Live` holder of the gradient kept here."""
    owner: object | None
    """Name of the optimizer that trains the rows."""

    def begin_batch(self, device: torch.device) -> None:
        """Prepare for another batch of the block, which is on `device`."""

    def chosen(self, flags: Tensor, *, is_there: bool = False) -> Callable[[], Ids]:
        """Start the transfer of flags to the device of the store.

        If they `is_there`, there is none. The returned function waits for it, once, and
        returns the indices of True elements, ascending, on the device of the store.
        """

    def choose(self, tokens: Tokens, k: int) -> Callable[[], tuple[Kept, Kept]]:
        """Start to score all neurons.

        The returned function waits. It returns the `k` neurons of each token with the
        largest scores, ascending, and the same neurons on the device of the store,
        where the rows of all tokens that are equal may be one.
        """

    def expect(self, ids: Callable[[], Ids]) -> None:
        """Note which rows the next batch takes; the function may wait for them."""

    def prepare(self, ids: Ids) -> None:
        """Announce the rows, ascending, that the running pass takes in any pieces.

        It is called once in each forward and each backward, also with no rows. It does
        nothing where this process has all rows.
        """

    def take(self, ids: Ids) -> SomeRows:
        """Return rows `ids`, ascending, on the device in the transfer dtype."""

    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        """Add to the gradients of rows `ids`, ascending; float32, on the device.

        What is added is rounded to the transfer dtype first, and sums are float32, so
        that they do not depend on what was transferred and when.
        """

    def reduce(self) -> None:
        """Exchange gradients with the processes of `division`, if there are any."""

    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        """Start the transfer of the gradient to the device of the store.

        The returned function waits for the transfer. It returns the rows that have a
        gradient, in any order, and the gradient in float32, without those that take
        their steps on the device.
        """

    def step(self, ids: Ids, gradient: SomeRows) -> None:
        """Take the last step of the schedule, with what `gradient()` has returned."""

    def on_device(self) -> list[Tensor]:
        """Return tensors on the device; only the first block returns shared ones."""

    def end_step(self) -> None:
        """Update the cache after rows of all blocks have taken a step."""

    def invalidate(self) -> None:
        """Invalidate copies on the device after a change other than a step."""


class ResidentRows(Rows):
    """Rows that are stored on the device."""

    division = None

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.is_settled = False
        self.live = None
        self.owner = None
        self._gradient: Tensor | None = None
        self._has_gradient = torch.zeros(len(store), dtype=torch.bool)

    def __reduce__(self) -> Any:
        """Reduce to the rows; a copy, also a saved one, has no gradient."""
        return ResidentRows, (self.store,)

    @override
    def begin_batch(self, device: torch.device) -> None:
        self.store.to(device)
        self._has_gradient = self._has_gradient.to(device)
        if self._gradient is not None:
            self._gradient = self._gradient.to(device)

    @override
    def chosen(self, flags: Tensor, *, is_there: bool = False) -> Callable[[], Ids]:
        return functools.cache(lambda: ids_of(flags))

    @override
    def choose(self, tokens: Tokens, k: int) -> Callable[[], tuple[Kept, Kept]]:
        # Rounded as where tokens are sent to the host.
        columns = choose(self.store, tokens.to(self.store.transfer_dtype), k)
        return lambda: (columns, columns)

    @override
    def expect(self, ids: Callable[[], Ids]) -> None:
        """Do nothing, because all rows are here."""

    @override
    def prepare(self, ids: Ids) -> None:
        """Do nothing, because all rows are here."""

    @override
    def take(self, ids: Ids) -> SomeRows:
        return self.store.read(ids)

    @override
    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self._add(ids, gradient.to(self.store.transfer_dtype).float())

    def _add(self, ids: Ids, gradient: SomeRows) -> None:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.store.rows)
        self._gradient.index_add_(0, ids, gradient)
        self._has_gradient[ids] = True

    @override
    def reduce(self) -> None:
        """Do nothing, because no other process has some of the gradient."""

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, found = ids_of(self._has_gradient), self.store.rows[:0]
        if self._gradient is not None:
            found = self._gradient[ids].to(self.store.transfer_dtype).float()
        return lambda: (ids, found)

    @override
    def step(self, ids: Ids, gradient: SomeRows) -> None:
        self.store.step(ids, gradient)

    @override
    def held_ids(self) -> list[Tensor]:
        return [] if self._gradient is None else [ids_of(self._has_gradient)]

    @override
    def parts(self) -> list[Tensor]:
        if self._gradient is None:
            return []
        return [self._gradient[ids] for ids in self.held_ids()]

    @override
    def put_parts(self, parts: list[Tensor]) -> None:
        for ids, part in zip(self.held_ids(), parts, strict=True):
            assert self._gradient is not None
            self._gradient[ids] = part

    @override
    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device)

    @override
    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        self.drop_gradient()
        self._add(ids, gradient)

    @override
    def drop_gradient(self) -> None:
        self._has_gradient.fill_(False)
        if self._gradient is not None:
            self._gradient.zero_()

    @override
    def on_device(self) -> list[Tensor]:
        held = self.store.tensors()
        return held if self._gradient is None else [*held, self._gradient]

    @override
    def end_step(self) -> None:
        """Do nothing, because there is no cache."""

    @override
    def invalidate(self) -> None:
        """Do nothing, because there are no copies."""


def choose(store: RowStore, tokens: Tokens, k: int) -> Kept:
    """Compute `Rows.choose` for tokens on the device of the store.

    Args:
        store: the store of the rows.
        tokens: `tokens hidden`.
        k: the number of neurons per token.

    Returns:
        The indices of the neurons, `tokens kept`.
    """
    if k == len(store):
        return top(tokens.new_empty(len(tokens), k), k)
    keys = store.keys()
    if keys.device.type == "cpu":
        return top(tokens.float() @ keys.float().T, k)
    return top((tokens.to(keys.dtype) @ keys.T).float(), k)
