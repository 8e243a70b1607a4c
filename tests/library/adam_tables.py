"""Tables of rows for Adam, gradients for them, and the forms of the update."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from meft.sparse import adam, idle
from meft.sparse.adam import RowTable

FORMS: dict[str, ModuleType] = {"plain": adam}
try:
    from meft.sparse import adam_kernel
except ModuleNotFoundError:
    pass
else:
    FORMS["kernel"] = adam_kernel

forms = pytest.mark.parametrize("form", FORMS)


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


ROWS, WIDTH, STEPS = 12, 12, 250
SOURCE = torch.arange(ROWS)
USUAL: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def start() -> Tensor:
    """Some rows of zeros among others."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    rows[::5] = 0
    return rows


def table(shadow: torch.dtype | None = None, rows: Tensor | None = None) -> RowTable:
    made = start() if rows is None else rows.clone()
    return RowTable(
        rows=made,
        first=torch.zeros_like(made),
        second=torch.zeros_like(made),
        factors=idle.new_factors(len(made)),
        updated_at=torch.zeros(len(made), dtype=torch.long),
        shadow=None if shadow is None else made.to(shadow),
    )


def wild(step: int) -> dict[str, Any]:
    """A group's values, all of which change: warm-up, lr 0 and raised again, cycled
    betas, eps that jumps, weight decay that comes and goes."""
    return {
        "lr": 0.0 if step % 40 < 5 else 1e-2 * min((step + 1) / 10, 1.0),
        "betas": (0.85 + 0.1 * (step % 30) / 30, 0.999 if step < 200 else 0.98),
        "eps": 1e-6 if step % 50 == 49 else 1e-8,
        "weight_decay": 0.1 * (step % 3),
    }


def gradients(
    share: float | None = None, steps: int = STEPS
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their gradients: of very different sizes, denormal and 1e-9 among them,
    from rows that always have one to rows that almost never do."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([1e-40, 1e-20, 1e-9, 1e-8, 1e-4, 1.0, 1e3])
    size = sizes[torch.randint(7, (ROWS, WIDTH), generator=generator)]
    shares = torch.linspace(0, 1, ROWS) ** 4 if share is None else share
    for step in range(steps):
        ids = (torch.rand(ROWS, generator=generator) < shares).nonzero()[:, 0]
        if step == 0:
            ids = SOURCE[1:]
        gradient = torch.randn(len(ids), WIDTH, generator=generator) * size[ids]
        yield ids, gradient


def now(form: ModuleType, made: RowTable, dtype: torch.dtype = torch.float32) -> Tensor:
    """What all rows are."""
    everyone = torch.arange(len(made.rows))
    out = torch.zeros(made.rows.shape, dtype=dtype)
    form.values(made, everyone, out, everyone)
    return out
