"""The bytes that an operator reads and writes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meft_bench.virtual.recording import work
from meft_bench.virtual.recording.tensors import tensors_in

TABLE, PART, INDEX = 100 * 8 * 4, 3 * 8 * 4, 3 * 8
"""Bytes of a table of 100 rows of 8 numbers, of three of its rows, of their indices."""


class Traffic(TorchDispatchMode):
    """Sum up the bytes of the operators in a context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        given = [*tensors_in(args), *tensors_in([*(kwargs or {}).values()])]
        found = work.traffic(func, [*tensors_in(out)], given)
        self.total += sum(size for _, size in found)
        return out


def index() -> Tensor:
    return torch.tensor([5, 1, 7])


READ: dict[str, Any] = {
    "embedding": lambda table, ids, part: torch.nn.functional.embedding(ids, table),
    "index_select": lambda table, ids, part: table.index_select(0, ids),
    "index_select, out": lambda table, ids, part: torch.index_select(
        table, 0, ids, out=part
    ),
    "index": lambda table, ids, part: table[ids],
}
WRITE: dict[str, Any] = {
    "index_copy_": (lambda table, ids, part: table.index_copy_(0, ids, part), 1),
    "index_add_": (lambda table, ids, part: table.index_add_(0, ids, part), 2),
}


@pytest.mark.parametrize("name", READ)
def test_reading_rows_of_a_table_is_not_reading_all_of_it(name: str) -> None:
    table, ids, part = torch.zeros(100, 8), index(), torch.zeros(3, 8)
    with Traffic() as traffic:
        READ[name](table, ids, part)
    assert traffic.total == PART + INDEX + PART


@pytest.mark.parametrize("name", WRITE)
def test_writing_rows_of_a_table_is_not_writing_all_of_it(name: str) -> None:
    table, ids, part = torch.zeros(100, 8), index(), torch.zeros(3, 8)
    change, passes = WRITE[name]
    with Traffic() as traffic:
        change(table, ids, part)
    assert traffic.total == passes * PART + INDEX + PART


def test_what_is_overwritten_is_not_read() -> None:
    table, other = torch.zeros(100, 8), torch.zeros(100, 8)
    with Traffic() as traffic:
        table.copy_(other)
    assert traffic.total == 2 * TABLE
    with Traffic() as traffic:
        torch.empty(100, 8)
    assert traffic.total == 0


def test_any_other_operator_reads_and_writes_its_tensors() -> None:
    table = torch.zeros(100, 8)
    with Traffic() as traffic:
        table + table
    assert traffic.total == 3 * TABLE
