"""Time of the host side of sparse adapters, beside a plain copy of as many bytes.

An update reads and writes 28 bytes a number: row, both moments and the gradient in,
the first three out. `copy` moves as many, half in and half out, so that the ratio of
two times of one group is the share of the copy's bandwidth that an update reaches.
`torch` is its fused AdamW on as many rows that lie together, which spares it to look
them up: at 100 % it is the pass over all rows that an update of some has to beat.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from meft.sparse import adam
from meft.sparse.adam import Schedule, Table

adam_kernel = pytest.importorskip("meft.sparse.adam_kernel", reason="numba is missing")

ROWS, WIDTH = 6144, 2 * 2048
"""Rows of one block; both moments and the rows are 300 MB, no cache holds them."""
UPDATES = {"kernel": adam_kernel.advance, "plain": adam.advance}


def table() -> Table:
    return Table(
        rows=torch.randn(ROWS, WIDTH),
        first=torch.zeros(ROWS, WIDTH),
        second=torch.zeros(ROWS, WIDTH),
        updated_at=torch.zeros(ROWS, dtype=torch.long),
    )


@pytest.mark.parametrize("share", [0.05, 0.26, 0.5, 1.0])
@pytest.mark.parametrize("what", ["copy", "torch", *UPDATES])
def test_update(benchmark: BenchmarkFixture, what: str, share: float) -> None:
    """Adam on a share of the rows, none of which was idle."""
    benchmark.group = f"update of {share:.0%} of the rows"
    torch.manual_seed(0)
    ids = torch.randperm(ROWS)[: int(share * ROWS)].sort().values
    if what == "copy":
        source = torch.ones(28 // 2 * len(ids) * WIDTH, dtype=torch.uint8)
        target = torch.zeros_like(source)
        benchmark.pedantic(target.copy_, (source,), rounds=10, warmup_rounds=2)
        return
    if what == "torch":
        rows = torch.randn(len(ids), WIDTH, requires_grad=True)
        rows.grad = torch.randn(len(ids), WIDTH)
        optimizer = torch.optim.AdamW([rows], fused=True)
        benchmark.pedantic(optimizer.step, rounds=10, warmup_rounds=2)
        return
    made, gradient = table(), torch.randn(len(ids), WIDTH)
    schedule = Schedule()

    def run() -> None:
        schedule.add(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        UPDATES[what](made, ids, gradient, schedule, idle=False)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
