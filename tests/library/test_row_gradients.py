"""What is done to gradients acts on rows of sparse adapters as on any parameter.

Each test does the same to a row parameter and to an ordinary parameter that has been
given the same gradient as a dense tensor.
"""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import meft
from library.sparse import batches, sparse_model
from marks import slow_but_for
from meft.errors import UnsupportedCallError
from meft.sparse.adapter import sparse_adapters
from meft.sparse.row_grad import RowGrad
from meft.sparse.row_parameter import rows_of

BUDGETS = pytest.mark.parametrize("device_bytes", slow_but_for([2**30, 9000], 9000))
"""Whether all gradients wait on the device, or most of them in host memory."""


def backward(model: PreTrainedModel, count: int = 1) -> None:
    for inputs in batches(count):
        model(**inputs).loss.backward()


def trainable(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def row_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    return [adapter.neurons for adapter in sparse_adapters(model).values()]


def dense_grad(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.to_dense() if isinstance(grad, RowGrad) else grad.clone()


def dense_twins(model: PreTrainedModel) -> list[nn.Parameter]:
    """Ordinary parameters with the values and gradients of the trainable ones."""
    twins = []
    for parameter in trainable(model):
        twin = nn.Parameter(parameter.detach().clone())
        twin.grad = None if parameter.grad is None else dense_grad(parameter)
        twins.append(twin)
    return twins


def assert_same_gradients(model: PreTrainedModel, twins: list[nn.Parameter]) -> None:
    for parameter, twin in zip(trainable(model), twins, strict=True):
        torch.testing.assert_close(dense_grad(parameter), twin.grad)


@BUDGETS
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 3.0, math.inf])
def test_clipping_by_a_norm(
    order: float, foreach: bool | None, device_bytes: int
) -> None:
    model = sparse_model(depth=2, device_bytes=device_bytes)
    backward(model)
    twins = dense_twins(model)
    norms = [
        nn.utils.clip_grad_norm_(parameters, 0.25, norm_type=order, foreach=foreach)
        for parameters in (model.parameters(), twins)
    ]
    torch.testing.assert_close(*norms)
    assert norms[0] > 0.25
    assert_same_gradients(model, twins)


@BUDGETS
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_value(foreach: bool | None, device_bytes: int) -> None:
    model = sparse_model(device_bytes=device_bytes)
    backward(model)
    twins = dense_twins(model)
    for parameters in (model.parameters(), twins):
        nn.utils.clip_grad_value_(parameters, 1e-3, foreach=foreach)
    assert_same_gradients(model, twins)


def noise(grad: Tensor) -> Tensor:
    return torch.randn(grad.shape, generator=torch.Generator().manual_seed(3))


def replaced(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter], None]:
    def act(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.grad = change(parameter.grad)

    return act


def in_place(change: Callable[[Tensor], object]) -> Callable[[nn.Parameter], None]:
    def act(parameter: nn.Parameter) -> None:
        change(parameter.grad)  # type: ignore[arg-type]

    return act


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "mul_": in_place(lambda g: g.mul_(0.5)),
    "mul_ by a tensor": in_place(lambda g: g.mul_(torch.tensor(0.5))),
    "mul_ by a mask": in_place(lambda g: g.mul_((noise(g) > 0).float())),
    "div_": in_place(lambda g: g.div_(3)),
    "neg_": in_place(lambda g: g.neg_()),
    "clamp_ that moves 0": in_place(lambda g: g.clamp_(min=0.1)),
    "nan_to_num_": in_place(lambda g: g.nan_to_num_(0.0)),
    "noise in place": in_place(lambda g: g.add_(noise(g))),
    "copy_": in_place(lambda g: g.copy_(noise(g))),
    "fill_": in_place(lambda g: g.fill_(0.25)),
    "data": in_place(lambda g: g.data.mul_(0.5)),
    "detach": in_place(lambda g: g.detach().mul_(0.5)),
    "half": replaced(lambda g: g * 0.5),
    "square": replaced(lambda g: g.square() * g.sign()),
    "noise": replaced(lambda g: g + noise(g)),
    "dense": replaced(noise),
    "clone": replaced(lambda g: g.clone()),
    "sum": replaced(lambda g: g + g.clone()),
    "normed": replaced(lambda g: g / (g.norm() + 1e-6)),
}


@BUDGETS
@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_hand(change: str, device_bytes: int) -> None:
    """Also seen by the next backward, which adds to the changed gradient."""
    model = sparse_model(device_bytes=device_bytes, depth=1)
    backward(model)
    twins = dense_twins(model)
    plain = [dense_grad(p) for p in trainable(model)]
    for parameter in (*trainable(model), *twins):
        CHANGES[change](parameter)
    assert_same_gradients(model, twins)
    backward(model)
    for twin, grad in zip(twins, plain, strict=True):
        assert twin.grad is not None
        twin.grad = twin.grad + grad
    assert_same_gradients(model, twins)


READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "norm over rows": lambda g: g.norm(dim=1),
    "sum": lambda g: g.sum(),
    "mean": lambda g: g.mean(),
    "abs max": lambda g: g.abs().max(),
    "isfinite": lambda g: torch.isfinite(g).all(),
    "isnan": lambda g: torch.isnan(g).any(),
    "min": lambda g: g.min(),
    "norm of order -1": lambda g: torch.linalg.vector_norm(g, -1),
    "histogram": lambda g: torch.histc(g, 7, -1, 1),
    "numpy": lambda g: torch.from_numpy(g.numpy()),
    "list": lambda g: torch.tensor(g.tolist()),
    "pickled": lambda g: pickle.loads(pickle.dumps(g)),
    "copied": lambda g: copy.deepcopy(g) * 1.0 + torch.zeros(g.shape),
}


@pytest.mark.parametrize("read", READS)
def test_reads(read: str) -> None:
    model = sparse_model(depth=1)
    backward(model)
    (parameter,) = row_parameters(model)
    dense = dense_grad(parameter)
    assert parameter.grad is not None
    torch.testing.assert_close(READS[read](parameter.grad), READS[read](dense))


def test_what_cannot_be_right_is_refused_with_the_way_to_do_it() -> None:
    """A view of a copy would lose writes; autograd never has the gradient."""
    model = sparse_model(depth=1)
    backward(model)
    (parameter,) = row_parameters(model)
    before = dense_grad(parameter)
    assert parameter.grad is not None
    views: list[Callable[[Tensor], Tensor]] = [
        lambda g: g[3],
        lambda g: g.view(-1),
        lambda g: g.T,
    ]
    for view in views:
        with pytest.raises(UnsupportedCallError, match="to_dense"):
            view(parameter.grad)
    with pytest.raises(UnsupportedCallError, match="register_post_accumulate"):
        parameter.register_hook(lambda grad: 2 * grad)
    (inputs,) = batches(1)
    with pytest.raises(UnsupportedCallError, match="call `backward"):
        torch.autograd.grad(model(**inputs).loss, trainable(model))
    assert torch.equal(dense_grad(parameter), before)


def test_a_gradient_of_other_tensors_leaves_that_of_the_rows_alone() -> None:
    """`autograd.grad` of the router, and `backward(inputs=...)`."""
    model = sparse_model(depth=1)
    backward(model)
    (parameter,) = row_parameters(model)
    before = dense_grad(parameter)
    (inputs,) = batches(1)
    others = [p for p in trainable(model) if rows_of(p) is None]
    found = torch.autograd.grad(model(**inputs).loss, others)
    assert all(grad.any() for grad in found)
    model(**inputs).loss.backward(inputs=others)
    assert torch.equal(dense_grad(parameter), before)
    model(**inputs).loss.backward(inputs=[parameter])
    torch.testing.assert_close(dense_grad(parameter), 2 * before)


def test_hooks_after_accumulation_see_and_change_the_whole_gradient() -> None:
    model, plain = sparse_model(depth=1), sparse_model(depth=1)
    (parameter,) = row_parameters(model)
    norms = []

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        norms.append(p.grad.norm())
        p.grad *= 0.5

    parameter.register_post_accumulate_grad_hook(halve)
    backward(model)
    backward(plain)
    wanted = dense_grad(row_parameters(plain)[0])
    torch.testing.assert_close(norms, [wanted.norm()])
    torch.testing.assert_close(dense_grad(parameter), wanted / 2)


def test_a_step_inside_the_backward_is_one_after_it() -> None:
    """One optimizer a parameter, stepped by its hook (fewer gradients at a time)."""
    inside, after = (sparse_model(depth=2, cache="window") for _ in range(2))
    for parameter in trainable(inside):
        optimizer = meft.SparseAdamW([parameter], lr=1e-2)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    optimizer = meft.SparseAdamW(after.parameters(), lr=1e-2)
    for inputs in batches(3):
        inside(**inputs).loss.backward()
        after(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(trainable(inside), trainable(after), strict=True):
        assert torch.equal(one, other)


def test_frozen_rows_have_no_gradient_and_train_again_once_unfrozen() -> None:
    model = sparse_model(depth=1)
    (parameter,) = row_parameters(model)
    parameter.requires_grad_(False)
    backward(model)
    assert parameter.grad is None
    parameter.requires_grad_(True)
    model.zero_grad()
    backward(model)
    fresh = sparse_model(depth=1)
    backward(fresh)
    assert torch.equal(dense_grad(parameter), dense_grad(row_parameters(fresh)[0]))


@BUDGETS
@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_an_overflow_rows_train_on(set_to_none: bool, device_bytes: int) -> None:
    """A loss scaler skips the step; infinite gradients are gone after `zero_grad`."""
    model = sparse_model(depth=1, device_bytes=device_bytes)
    plain = sparse_model(depth=1, device_bytes=device_bytes)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made = [meft.SparseAdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    for step, inputs in enumerate(batches(4)):
        factor = 3e38 if step == 1 else 1.0
        scaler.scale(model(**inputs).loss * factor).backward()
        if step == 1:
            parameter = row_parameters(model)[0]
            assert parameter.grad is not None
            assert not torch.isfinite(parameter.grad).all()
        else:
            plain(**inputs).loss.backward()
            made[1].step()
        before = [p.detach().clone() for p in trainable(model)]
        scaler.step(made[0])
        moved = [
            not torch.equal(p, b) for p, b in zip(trainable(model), before, strict=True)
        ]
        assert all(moved) != (step == 1)
        assert any(moved) != (step == 1)
        scaler.update()
        for optimizer in made:
            optimizer.zero_grad(set_to_none=set_to_none)
    assert scaler.get_scale() < 1024
    for one, other in zip(trainable(model), trainable(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("update", ["dense", "lazy", "catchup"])
def test_a_discarded_batch_leaves_no_trace(update: str) -> None:
    """Whichever way gradients are cleared."""
    found = []
    for how in ("none", "zeros", "never"):
        model = sparse_model(depth=1, update=update)
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
        for step, inputs in enumerate(batches(4)):
            if step == 2:
                if how != "never":
                    model(**inputs).loss.backward()
                    optimizer.zero_grad(set_to_none=how == "none")
                continue
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in trainable(model)])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@BUDGETS
def test_whoever_keeps_a_gradient_keeps_its_values(device_bytes: int) -> None:
    """After it was cleared or replaced, backwards add to another one; it can be put
    back, as methods do that combine gradients of several losses."""
    model = sparse_model(depth=1, device_bytes=device_bytes)
    first, second = batches(2)
    parameters = trainable(model)

    def gradients(inputs: dict[str, Tensor]) -> list[Any]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return [p.grad for p in parameters]

    one = gradients(first)
    wanted = [g.to_dense() if isinstance(g, RowGrad) else g.clone() for g in one]
    two = gradients(second)
    for kept, old in zip(one, wanted, strict=True):
        found = kept.to_dense() if isinstance(kept, RowGrad) else kept
        assert torch.equal(found, old)
    for parameter, a, b in zip(parameters, one, two, strict=True):
        parameter.grad = a + 2 * b
    both = [dense_grad(p) for p in parameters]
    model(**first).loss.backward()
    for parameter, old, sum_of_both in zip(parameters, wanted, both, strict=True):
        torch.testing.assert_close(dense_grad(parameter), sum_of_both + old)


def test_a_gradient_stays_until_it_is_cleared() -> None:
    """Two steps on one gradient are what they are for an ordinary parameter."""
    model = sparse_model(depth=1)
    backward(model)
    twins = dense_twins(model)
    mine = meft.SparseAdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        mine.step()
        theirs.step()
    for parameter, twin in zip(trainable(model), twins, strict=True):
        torch.testing.assert_close(parameter.detach(), twin.detach())
