"""Operators and copies for which the host waits, counted."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meft.sparse.engine import Engine
from meft.sparse.indices import ids_of
from meft.sparse.store import RowStore
from meft.transfer import PendingCopy

OPERATORS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""Operators that return a value to the host, or whose size depends on values."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operators that wait if one of their indices is a mask."""


class Waits(TorchDispatchMode):
    """Count operators for which the host would wait for a GPU.

    Tensors of the host are on the same device in these tests. Code that runs on the
    host is left out by `on_host`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.is_on_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        is_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        is_repeat = name == "repeat_interleave" and func._overloadname == "Tensor"
        counts_itself = is_repeat and kwargs.get("output_size") is None
        if (name in OPERATORS or is_mask or counts_itself) and not self.is_on_host:
            self.found[name] += 1
        return func(*args, **kwargs)


_sent: list[PendingCopy] = []
"""Copies to the host that were started in `counted`, also an earlier one."""


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count operators that wait, and copies to the host that are waited for."""
    waits, get, download = Waits(), PendingCopy.get, Engine.download

    def waited(copy: PendingCopy) -> torch.Tensor:
        if any(copy is each for each in _sent):
            waits.found["download"] += 1
        return get(copy)

    def noted(engine: Engine, *args: Any) -> PendingCopy:
        _sent.append(download(engine, *args))
        return _sent[-1]

    with (
        mock.patch.object(PendingCopy, "get", waited),
        mock.patch.object(Engine, "download", noted),
        _host_functions(waits),
        waits,
    ):
        yield waits.found


@contextlib.contextmanager
def _host_functions(waits: Waits) -> Iterator[None]:
    """Leave out what runs on the tensors of a store, which are the host's."""

    def leaving_out(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, waits.is_on_host = waits.is_on_host, True
            try:
                return function(*args, **kwargs)
            finally:
                waits.is_on_host = before

        return run

    with contextlib.ExitStack() as stack:
        for name in ("read", "version", "keys", "due", "span", "step", "settled"):
            patched = leaving_out(getattr(RowStore, name))
            stack.enter_context(mock.patch.object(RowStore, name, patched))
        stack.enter_context(ids_of.replaced(leaving_out(ids_of.plain)))
        yield
