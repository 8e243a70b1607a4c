"""Gradients of rows that are summed in host memory."""

import numpy as np
import torch

from meft.sparse.cache import Longs
from meft.sparse.shapes import AllRows, Ids, SomeRows
from meft.sparse.store import RowStore
from meft.transfer import PendingCopy


class HostGradient:
    """The gradient of some rows of a block, in host memory.

    Args:
        store: the rows of the block.
    """

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._sums: AllRows | None = None
        self.has_gradient = np.zeros(len(store), bool)
        """Whether each row has a gradient here, or on its way."""
        self._coming: tuple[Longs, PendingCopy] | None = None

    def __bool__(self) -> bool:
        return bool(self.has_gradient.any())

    @property
    def ids(self) -> Ids:
        """Return the rows that have a gradient here, ascending."""
        return torch.from_numpy(self.has_gradient.nonzero()[0])

    @property
    def values(self) -> SomeRows:
        """Return a copy of the gradients of `ids`; there is at least one."""
        self.arrive()
        assert self._sums is not None
        return self._sums[self.ids]

    def expect(self, ids: Longs, gradient: PendingCopy) -> None:
        """Add to the gradients of rows `ids`, but wait for the copy later.

        Everything that needs the sum waits, and so does the next call.
        """
        self.arrive()
        self.has_gradient[ids] = True
        self._coming = ids, gradient

    def arrive(self) -> None:
        """Wait for what is on its way."""
        coming, self._coming = self._coming, None
        if coming is not None:
            ids, gradient = coming
            self.add(ids, gradient.get())

    def add(self, ids: Longs, gradient: SomeRows) -> None:
        """Add to the gradients of rows `ids`."""
        self.arrive()
        if self._sums is None:
            self._sums = self._store.zeros()
        self._sums.index_add_(0, torch.from_numpy(ids), gradient.float())
        self.has_gradient[ids] = True

    def put(self, values: SomeRows) -> None:
        """Replace the gradients of `ids`, of which there is at least one."""
        self.arrive()
        assert self._sums is not None
        self._sums[self.ids] = values

    def drop(self) -> None:
        """Set all gradients to 0."""
        self._coming = None
        if self._sums is not None:
            self._sums[self.ids] = 0
        self.has_gradient.fill(False)
