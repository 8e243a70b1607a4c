"""Time of the host side of sparse adapters, next to passes over as many bytes.

An update with a 16-bit copy reads 16 bytes a number (row, both moments, gradient) and
writes 14 (the first three, and the copy). `in place` is a pass that reads and writes
the same with an addition for arithmetic: the ratio of two times of one group is the
share of memory's bandwidth that an update reaches. `copy` moves as many bytes, half in
and half out, and is slower, as memory that is written without having been read is read
all the same. `torch` is its fused AdamW on as many rows that lie together, without a
16-bit copy.

Reading is by idle steps: a row costs the same after 10 and after 100,000 of them. A
step of the schedule costs the same whatever its number.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from meft.sparse import adam, idle
from meft.sparse.adam import RowTable
from meft.sparse.schedule import Schedule

numba = pytest.importorskip("numba", reason="numba is missing")
from meft.sparse import adam_kernel  # noqa: E402

ROWS, WIDTH = 6144, 2 * 2048
"""Rows of one block; both moments and the rows are 300 MB, no cache holds them."""
VALUES: dict[str, Any] = {
    "lr": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
}


def table(rows: int = ROWS, width: int = WIDTH) -> RowTable:
    made = torch.randn(rows, width)
    return RowTable(
        rows=made,
        first=torch.zeros(rows, width),
        second=torch.zeros(rows, width),
        factors=idle.new_factors(rows),
        updated_at=torch.zeros(rows, dtype=torch.long),
        shadow=made.bfloat16(),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@numba.njit(parallel=True, error_model="numpy")
@no_type_check
def _in_place(rows, first, second, shadow, ids, gradient):
    for n in numba.prange(ids.size):
        i = ids[n]
        p, m, v, s, g = rows[i], first[i], second[i], shadow[i], gradient[n]
        for k in range(p.size):
            new = g[k]
            at = np.float32(p[k] + new)
            p[k], m[k], v[k] = at, m[k] + new, v[k] + new
            s[k] = adam_kernel._bfloat16(at.view(np.uint32))


def copy_of(size: int) -> Callable[[], object]:
    source = torch.ones(30 // 2 * size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def in_place(ids: torch.Tensor, gradient: torch.Tensor) -> Callable[[], object]:
    made = table()
    assert made.shadow is not None
    tensors = made.rows, made.first, made.second, made.shadow.view(torch.int16)
    arrays = [t.numpy() for t in (*tensors, ids, gradient)]
    arrays[3] = arrays[3].view(np.uint16)
    adam_kernel._use_threads()
    return lambda: _in_place(*arrays)


def torchs(ids: torch.Tensor, gradient: torch.Tensor) -> Callable[[], object]:
    rows = torch.randn(len(ids), WIDTH, requires_grad=True)
    rows.grad = gradient
    return torch.optim.AdamW([rows], fused=True).step


def update(
    ids: torch.Tensor, gradient: torch.Tensor, form: Any, gap: int
) -> Callable[[], object]:
    made, schedule = table(), Schedule()

    def run() -> None:
        for _ in range(gap):
            schedule.add(**VALUES)
            form.advance(made, ids[:0], gradient[:0], schedule, idle=True)
        schedule.add(**VALUES)
        form.advance(made, ids, gradient, schedule, idle=True)

    return run


@pytest.mark.parametrize("share", [0.05, 0.26, 0.5, 1.0])
@pytest.mark.parametrize(
    "what", ["copy", "in place", "torch", "update", "update, idle before", "plain"]
)
def test_update(benchmark: BenchmarkFixture, what: str, share: float) -> None:
    """Adam on a share of the rows. With idle rows, an idle step of the whole table is
    part of what is measured."""
    benchmark.group = f"update of {share:.0%} of the rows"
    ids = torch.randperm(ROWS)[: int(share * ROWS)].sort().values
    gradient = 1e-4 * torch.randn(len(ids), WIDTH)
    made = {
        "copy": lambda: copy_of(gradient.numel()),
        "in place": lambda: in_place(ids, gradient),
        "torch": lambda: torchs(ids, gradient),
        "update": lambda: update(ids, gradient, adam_kernel, 0),
        "update, idle before": lambda: update(ids, gradient, adam_kernel, 1),
        "plain": lambda: update(ids, gradient, adam, 0),
    }
    benchmark.pedantic(made[what](), rounds=10, warmup_rounds=2)


@pytest.mark.benchmark(group="reading 200 rows of 1152 after idle steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 10, 100, 1000, 5000, 100_000])
def test_reading(benchmark: BenchmarkFixture, gap: int, dtype: torch.dtype) -> None:
    """What rows are now, computed into memory of its own."""
    made, schedule, every = table(200, 1152), Schedule(), torch.arange(200)
    gradient, out = 1e-4 * torch.randn(200, 1152), torch.zeros(200, 1152, dtype=dtype)
    for step in range(gap + 1):
        some = every if step == 0 else every[:0]
        schedule.add(**VALUES)
        adam_kernel.advance(made, some, gradient[: len(some)], schedule, idle=True)
    run = (made, every, out, every)
    benchmark.pedantic(adam_kernel.values, run, rounds=200, warmup_rounds=20)


@pytest.mark.benchmark(group="a step of the schedule and of 6144 idle rows")
@pytest.mark.parametrize("count", [100, 1000, 10_000, 100_000])
def test_step(benchmark: BenchmarkFixture, count: int) -> None:
    """After `count` steps."""
    made, schedule = table(ROWS, 16), Schedule()
    every, gradient = torch.arange(ROWS), torch.randn(ROWS, 16)
    for _ in range(count):
        schedule.add(**VALUES)
    adam_kernel.advance(made, every, gradient, schedule, idle=True)

    def run() -> None:
        schedule.add(**VALUES)
        adam_kernel.advance(made, every[:0], gradient[:0], schedule, idle=True)

    benchmark.pedantic(run, rounds=100, warmup_rounds=10)
