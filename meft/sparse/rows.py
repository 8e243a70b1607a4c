"""What an adapter asks of its rows, wherever they live.

    choose(h, k)             the k best neurons of each token, every neuron scored
    take(ids)                rows as they are now, on the device
    add_gradient(ids, g)     remember a gradient until gradients are cleared
    parts(), put_parts()     what is remembered, to be read and changed where it is
    gradient()               what is remembered, on its way to the optimizer

`ResidentRows` answers from the device's own memory and is the plain twin of
`meft.sparse.engine.OffloadedRows`: between equal questions there is no arithmetic but
copies, so both give the same bits.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from meft.sparse.router import top
from meft.sparse.store import Ids, RowStore

SomeRows = Float[Tensor, "some width"]
Tokens = Float[Tensor, "tokens hidden"]


@runtime_checkable
class Holder(Protocol):
    """Gradients of some rows of a table."""

    def held_ids(self) -> list[Tensor]:
        """Rows that have a gradient, per part, where the store is."""

    def parts(self) -> list[Tensor]:
        """Copies of the gradients, float32, one tensor per place where some are."""

    def put_parts(self, parts: list[Tensor]) -> None:
        """Replace the gradients, given as `parts()` returns them."""

    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of the optimizer's or of the user's on `device`."""

    def replace_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        """Remember this and nothing else; float32, both where the store is."""

    def drop_gradient(self) -> None:
        """Forget all that `add_gradient` added."""


@runtime_checkable
class Rows(Holder, Protocol):
    """Rows of one block."""

    store: RowStore
    """Their home."""
    is_settled: bool
    """Whether the backward in the works has compared what is remembered with the
    parameter's gradient."""
    live: Callable[[], Any] | None
    """A weak reference to what gives others the remembered gradient."""
    owner: object | None
    """What the optimizer that trains them calls itself."""

    def begin_batch(self, device: torch.device) -> None:
        """The block starts on another batch, which is on `device`."""

    def chosen(self, flags: Tensor) -> Ids:
        """Indices of what is True in `flags`, known where rows are looked up."""

    def choose(self, tokens: Tokens, k: int) -> Int[Tensor, "tokens kept"]:
        """The `k` neurons of each token with the largest scores, ascending."""

    def take(self, ids: Ids) -> SomeRows:
        """Rows `ids`, ascending, on the device in the wire's dtype."""

    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        """Add to the gradients of rows `ids`, ascending; float32, on the device."""

    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        """Start to bring the gradient to where the store is.

        The result waits for it: rows that have one, ascending or not, and it in
        float32.
        """

    def on_device(self) -> list[Tensor]:
        """What this block, or the first of those that share it, holds on the device."""

    def end_step(self) -> None:
        """Rows of all blocks have taken a step."""

    def invalidate(self) -> None:
        """Rows were changed other than by a step: copies on the device are void."""


class ResidentRows(Rows):
    """Rows that live on the device."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.is_settled = False
        self.live = None
        self.owner = None
        self._gradient: Tensor | None = None
        self._has_gradient = torch.zeros(len(store), dtype=torch.bool)

    def __reduce__(self) -> Any:
        """A copy, also a saved one, has the rows and no gradient."""
        return ResidentRows, (self.store,)

    @override
    def begin_batch(self, device: torch.device) -> None:
        self.store.to(device)
        self._has_gradient = self._has_gradient.to(device)
        if self._gradient is not None:
            self._gradient = self._gradient.to(device)

    @override
    def chosen(self, flags: Tensor) -> Ids:
        return flags.nonzero()[:, 0]

    @override
    def choose(self, tokens: Tokens, k: int) -> Int[Tensor, "tokens kept"]:
        return choose(self.store, tokens, k)

    @override
    def take(self, ids: Ids) -> SomeRows:
        return self.store.read(ids)

    @override
    def add_gradient(self, ids: Ids, gradient: SomeRows) -> None:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.store.rows)
        self._gradient.index_add_(0, ids, gradient)
        self._has_gradient[ids] = True

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, found = self.chosen(self._has_gradient), self.store.rows[:0]
        if self._gradient is not None:
            found = self._gradient[ids].to(self.store.wire_dtype).float()
        return lambda: (ids, found)

    @override
    def held_ids(self) -> list[Tensor]:
        return [] if self._gradient is None else [self.chosen(self._has_gradient)]

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
        self.add_gradient(ids, gradient)

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
        """Nothing is kept that a step could make wrong."""

    @override
    def invalidate(self) -> None:
        """Nothing is copied."""


def choose(store: RowStore, tokens: Tokens, k: int) -> Int[Tensor, "tokens kept"]:
    """`Rows.choose` for tokens that are where the store is."""
    if k == len(store):
        return top(tokens.new_empty(len(tokens), k), k)
    keys = store.keys()
    if keys.device.type == "cpu":
        return top(tokens.float() @ keys.float().T, k)
    return top((tokens.to(keys.dtype) @ keys.T).float(), k)
