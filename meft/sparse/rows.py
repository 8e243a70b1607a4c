"""What an adapter asks of its rows, wherever they live.

    choose(h, k)             the k best neurons of each token, every neuron scored
    take(ids)                rows as they are now, on the device
    add_gradient(ids, g)     remember a gradient until the next optimizer step
    gradient()               what was remembered, on its way to the optimizer

`ResidentRows` answers from the device's own memory and is the plain twin of
`meft.sparse.engine.OffloadedRows`: between equal questions there is no arithmetic but
copies, so both give the same bits.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from meft.sparse.router import top
from meft.sparse.store import Ids, RowStore

SomeRows = Float[Tensor, "some width"]
Tokens = Float[Tensor, "tokens hidden"]


@runtime_checkable
class Rows(Protocol):
    """Rows of one block."""

    store: RowStore
    """Their home."""

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

    def norm(self) -> Tensor:
        """Size of all that `add_gradient` added, a float32 scalar on the device."""

    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        """Start to bring the gradient to where the store is.

        The result waits for it: rows that have one, ascending or not, and it in
        float32.
        """

    def at_home(self, number: Tensor) -> Tensor:
        """A number of the device, where the rows live."""

    def scale_gradient(self, factor: Tensor) -> None:
        """Multiply all that `add_gradient` added."""

    def drop_gradient(self) -> None:
        """Forget all that `add_gradient` added."""

    def on_device(self) -> list[Tensor]:
        """What this block, or the first of those that share it, holds on the device."""

    def end_step(self) -> None:
        """Rows of all blocks have taken a step."""

    def forget(self) -> None:
        """Rows were replaced: what was computed from the old ones is void."""


class ResidentRows(Rows):
    """Rows that live on the device."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self._gradient: Tensor | None = None
        self._square = torch.zeros((), dtype=torch.double)
        self._has_gradient = torch.zeros(len(store), dtype=torch.bool)

    @override
    def begin_batch(self, device: torch.device) -> None:
        self.store.to(device)
        self._square = self._square.to(device)
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
        self._square += add_rows(self._gradient, ids, gradient)
        self._has_gradient[ids] = True

    @override
    def norm(self) -> Tensor:
        return size(self._square)

    @override
    def gradient(self) -> Callable[[], tuple[Ids, SomeRows]]:
        ids, found = self.chosen(self._has_gradient), self.store.rows[:0]
        if self._gradient is not None:
            found = self._gradient[ids].to(self.store.wire_dtype).float()
        return lambda: (ids, found)

    @override
    def at_home(self, number: Tensor) -> Tensor:
        return number

    @override
    def scale_gradient(self, factor: Tensor) -> None:
        self._square *= factor * factor
        if self._gradient is not None:
            self._gradient *= factor

    @override
    def on_device(self) -> list[Tensor]:
        held = self.store.tensors()
        return held if self._gradient is None else [*held, self._gradient]

    @override
    def end_step(self) -> None:
        """Nothing is kept that a step could make wrong."""

    @override
    def forget(self) -> None:
        self.drop_gradient()

    @override
    def drop_gradient(self) -> None:
        self._has_gradient.fill_(False)
        self._square.zero_()
        if self._gradient is not None:
            self._gradient.zero_()


def choose(store: RowStore, tokens: Tokens, k: int) -> Int[Tensor, "tokens kept"]:
    """`Rows.choose` for tokens that are where the store is."""
    if k == len(store):
        return top(tokens.new_empty(len(tokens), k), k)
    keys = store.keys()
    if keys.device.type == "cpu":
        return top(tokens.float() @ keys.float().T, k)
    return top((tokens.to(keys.dtype) @ keys.T).float(), k)


def add_rows(
    sums: Float[Tensor, "slots width"],
    places: Ids,
    gradient: Float[Tensor, "some width"],
) -> Tensor:
    """Add `gradient` to rows of `sums`; by how much their squared size grew."""
    old = sums[places]
    new = old + gradient
    sums[places] = new
    # (a + b)^2 - a^2 = b (2 a + b)
    return old.add_(new).mul_(gradient).sum(1).double().sum()


def size(square: Tensor) -> Tensor:
    """The root of a sum of differences, which rounding may leave below 0."""
    return square.clamp(min=0).sqrt().float()
