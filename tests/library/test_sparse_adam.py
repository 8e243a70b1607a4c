"""Adam on some rows of a table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meft.sparse import adam
from meft.sparse.adam import Schedule, Table
from meft.testing import tolerance

try:
    from meft.sparse import adam_kernel
except ModuleNotFoundError:
    KERNELS: dict[str, Callable[..., None]] = {"plain": adam.advance}
else:
    KERNELS = {"plain": adam.advance, "kernel": adam_kernel.advance}

ROWS, WIDTH, STEPS = 40, 9, 200


def table() -> Table:
    generator = torch.Generator().manual_seed(1)
    return Table(
        rows=torch.randn(ROWS, WIDTH, generator=generator),
        first=torch.zeros(ROWS, WIDTH),
        second=torch.zeros(ROWS, WIDTH),
        updated_at=torch.zeros(ROWS, dtype=torch.long),
    )


VALUES: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def lr_of(step: int) -> float:
    """Warm-up, then linear decay."""
    return 1e-2 * min((step + 1) / 10, 1 - step / (STEPS + 1))


def gradients(share: float = 0.1) -> list[tuple[Tensor, Tensor]]:
    """Rows and their gradients, of very different sizes, with random idle gaps."""
    generator = torch.Generator().manual_seed(2)
    scale = 10.0 ** torch.randint(-9, 3, (ROWS, 1), generator=generator)
    found = []
    for _ in range(STEPS):
        ids = (torch.rand(ROWS, generator=generator) < share).nonzero()[:, 0]
        found.append(
            (ids, torch.randn(len(ids), WIDTH, generator=generator) * scale[ids])
        )
    return found


def run(
    advance: Callable[..., None],
    update: str,
    weight_decay: float = 0.0,
    share: float = 0.1,
) -> Table:
    made, factors = table(), Schedule()
    for step, (ids, gradient) in enumerate(gradients(share)):
        factors.add(lr=lr_of(step), weight_decay=weight_decay, **VALUES)
        if update == "dense":
            whole = torch.zeros(ROWS, WIDTH)
            whole[ids] = gradient
            ids, gradient = torch.arange(ROWS), whole
        advance(made, ids, gradient, factors, idle=update != "lazy")
    if update == "catchup":
        advance(made, torch.arange(ROWS), None, factors, idle=True)
    return made


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_catching_up_is_the_dense_update(kernel: str, weight_decay: float) -> None:
    """Over 200 steps with random idle gaps; the kernel's bits are the same."""
    late = run(KERNELS[kernel], "catchup", weight_decay)
    dense = run(KERNELS[kernel], "dense", weight_decay)
    if kernel == "kernel":
        for name in ("rows", "first", "second"):
            assert torch.equal(getattr(late, name), getattr(dense, name))
    # torch's square root depends on how many numbers it is given.
    torch.testing.assert_close(
        late.rows, dense.rows, rtol=tolerance(torch.float32, 1), atol=1e-6
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_dense_update_is_torchs_adamw(kernel: str, weight_decay: float) -> None:
    found = run(KERNELS[kernel], "dense", weight_decay).rows
    parameter = torch.nn.Parameter(table().rows)
    optimizer = torch.optim.AdamW([parameter], weight_decay=weight_decay)
    for step, (ids, gradient) in enumerate(gradients()):
        parameter.grad = torch.zeros(ROWS, WIDTH)
        parameter.grad[ids] = gradient
        optimizer.param_groups[0]["lr"] = lr_of(step)
        optimizer.step()
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_lazy_update_is_torchs_sparse_adam(kernel: str) -> None:
    found = run(KERNELS[kernel], "lazy").rows
    parameter = torch.nn.Parameter(table().rows)
    optimizer = torch.optim.SparseAdam([parameter], lr=1.0)
    for step, (ids, gradient) in enumerate(gradients()):
        parameter.grad = torch.sparse_coo_tensor(
            ids[None], gradient, (ROWS, WIDTH), check_invariants=True
        )
        optimizer.param_groups[0]["lr"] = lr_of(step)
        optimizer.step()
    # It adds eps before, we after dividing by the root of the bias correction.
    loud = run(KERNELS[kernel], "lazy").second.amax(1) > 1e-8
    torch.testing.assert_close(
        found[loud], parameter.detach()[loud], rtol=1e-3, atol=1e-3
    )


@pytest.mark.skipif("kernel" not in KERNELS, reason="numba is not installed")
@pytest.mark.parametrize("update", ["dense", "catchup", "lazy"])
def test_the_kernel_is_the_plain_update(update: str) -> None:
    plain, fused = (run(KERNELS[name], update, 0.1) for name in ("plain", "kernel"))
    assert torch.equal(plain.updated_at, fused.updated_at)
    for name in ("first", "second"):
        assert torch.equal(getattr(plain, name), getattr(fused, name))
    # Their square roots differ in the last bit.
    torch.testing.assert_close(plain.rows, fused.rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_where_every_row_has_a_gradient_all_updates_are_one(kernel: str) -> None:
    dense, lazy, late = (
        run(KERNELS[kernel], update, share=1.0).rows
        for update in ("dense", "lazy", "catchup")
    )
    assert torch.equal(lazy, dense)
    assert torch.equal(late, dense)


def test_rows_without_a_gradient_so_far_stand_still() -> None:
    made, factors = table(), Schedule()
    before = made.rows.clone()
    factors.add(lr=1e-2, weight_decay=0.0, **VALUES)
    adam.advance(made, torch.tensor([3]), torch.ones(1, WIDTH), factors, idle=True)
    moved: Any = (made.rows != before).any(1).nonzero().flatten().tolist()
    assert moved == [3]
