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
        if not func.is_view:
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


def test_what_has_a_form_only_is_not_read() -> None:
    table = torch.zeros(100, 8)
    with Traffic() as traffic:
        torch.zeros_like(table)
    assert traffic.total == TABLE
    with Traffic() as traffic:
        torch.ops.aten._unsafe_view(table, [8, 100])
    assert traffic.total == 0


def test_no_more_of_a_table_is_read_than_it_has() -> None:
    """Though many tokens ask for the same rows; what is expanded is read once."""
    table, ids = torch.zeros(2, 8), torch.zeros(50, dtype=torch.long)
    with Traffic() as traffic:
        torch.nn.functional.embedding(ids, table)
    assert traffic.total == 2 * 8 * 4 + 50 * 8 + 50 * 8 * 4
    one = torch.zeros(1, 8).expand(100, 8)
    with Traffic() as traffic:
        one.clone()
    assert traffic.total == 8 * 4 + TABLE


def test_the_loss_reads_one_number_a_row() -> None:
    logits = torch.zeros(100, 8, requires_grad=True)
    labels = torch.zeros(100, dtype=torch.long)
    with Traffic() as forward:
        loss = torch.nn.functional.nll_loss(logits, labels)
    assert forward.total < TABLE
    with Traffic() as backward:
        loss.backward()
    assert TABLE <= backward.total < 2 * TABLE  # the gradient is written


def test_any_other_operator_reads_and_writes_its_tensors() -> None:
    table = torch.zeros(100, 8)
    with Traffic() as traffic:
        table + table
    assert traffic.total == 3 * TABLE
