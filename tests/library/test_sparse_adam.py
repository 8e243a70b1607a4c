"""Adam on some rows of a table, and on rows that were idle for long."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from library.adam_tables import (
    FORMS,
    ROWS,
    SOURCE,
    STEPS,
    USUAL,
    WIDTH,
    forms,
    gradients,
    now,
    slow,
    start,
    table,
    wild,
)
from meft.sparse import adam, idle
from meft.sparse.adam import RowTable
from meft.sparse.schedule import Schedule

REST = 226
"""Idle steps after which a row rests, with the usual betas: H."""


def usual(step: int) -> dict[str, Any]:
    """Warm-up, then linear decay."""
    return USUAL | {"lr": 1e-2 * min((step + 1) / 10, 1 - step / (2 * STEPS))}


def run(
    form: ModuleType,
    values: Callable[[int], dict[str, Any]] = usual,
    *,
    lazy: bool = False,
    shadow: torch.dtype | None = None,
) -> RowTable:
    made, schedule = table(shadow), Schedule(idle=not lazy)
    for step, (ids, gradient) in enumerate(gradients()):
        schedule.add(**values(step))
        form.advance(made, ids, gradient, schedule, idle=not lazy)
    return made


def equal(one: RowTable, other: RowTable) -> bool:
    """Every tensor, in every bit."""
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("rows", "first", "second", "factors", "updated_at")
    )


# The twin: every row, every step, each from its own history.


@functools.cache
def dense(values: Callable[[int], dict[str, Any]]) -> tuple[Tensor, ...]:
    """p, m, v after every row was computed anew, from the whole history, in every step.

    Written from the formula alone, in Python's own numbers: a row's sums are added up
    from its last gradient on each time, nothing is carried along.
    """
    rows, first, second = start(), torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
    since, fade = [-1] * ROWS, [0.0] * ROWS
    schedule, value = Schedule(), rows.clone()
    history: list[Schedule] = []
    centres: list[float] = [1.0] * ROWS
    live = [False] * ROWS
    f32 = torch.tensor

    def factors(row: int, until: int) -> tuple[float, float, float, list[float]]:
        shrink, mean, root, sums = 1.0, float(live[row]), 1.0, [0.0] * len(idle.NODES)
        for s in history[since[row] + 1 : until]:
            shrink *= s.decay
            mean *= s.beta1
            root *= s.sqrt_beta2
            weight, away = mean / root * s.weight, s.offset / root - centres[row]
            for k, node in enumerate(idle.NODES.tolist()):
                sums[k] = sums[k] * s.decay + weight / (away * node + centres[row])
        return shrink, mean, root, sums

    def at(row: int, until: int) -> Tensor:
        shrink, mean, _, sums = factors(row, until)
        if f32(sums[0]) == 0:
            return rows[row] * f32(shrink)
        x = f32(centres[row]) / (second[row].double().sqrt().float() + centres[row])
        phi = torch.zeros(WIDTH)
        for powers in reversed(idle.POWERS.tolist()):
            total = 0.0
            for power, of_node in zip(powers, sums, strict=True):
                total = total + of_node * power
            phi = phi * x + f32(total)
        heard = first[row].abs() >= f32(2.0**-100) / f32(mean)
        return rows[row] * f32(shrink) - first[row] * heard * (x * phi)

    def moments(row: int, until: int, beta1: float, beta2: float) -> tuple[Tensor, ...]:
        _, mean, root, _ = factors(row, until)
        share = f32(root * root * beta2)
        heard = first[row].abs() >= f32(2.0**-100) / f32(mean)
        seen = second[row] >= f32(2.0**-126) / share
        return first[row] * heard * f32(mean * beta1), second[row] * seen * share

    for step, (ids, gradient) in enumerate(gradients()):
        schedule.add(**values(step))
        s = Schedule(**{n: getattr(schedule, n) for n in Schedule.__slots__})
        history.append(s)
        with_gradient = dict(zip(ids.tolist(), gradient, strict=True))
        for row in range(ROWS):
            if row in with_gradient:
                p, g = at(row, step), with_gradient[row]
                m, v = moments(row, step, s.beta1, s.beta2)
                g = g * (g.abs() >= f32((2.0**-126 / (1 - s.beta2)) ** 0.5))
                m, v = m + g * (1 - s.beta1), v + g * g * (1 - s.beta2)
                under = v.double().sqrt().float() * s.root + s.eps
                rows[row] = p * s.decay - m * s.size / under
                first[row], second[row] = m, v
                since[row], live[row], fade[row] = step, True, 1.0
                centres[row] = idle.centre_of(s)
            else:
                _, mean, root, _ = factors(row, step)
                middle = centres[row] * (root * s.sqrt_beta2)
                far = s.offset > 2 * middle or s.offset * 2 < middle
                if mean > 0 and (fade[row] <= 2.0**-34 or far):
                    p, (m, v) = at(row, step), moments(row, step, 1.0, 1.0)
                    live[row] = fade[row] > 2.0**-34
                    rows[row], first[row], second[row] = p, m * live[row], v
                    since[row], centres[row] = step - 1, idle.centre_of(s)
                fade[row] *= s.fading
            value[row] = at(row, step + 1)
    return value, rows, first, second


@forms
@pytest.mark.parametrize("values", [wild, slow(usual)])
def test_catching_up_is_the_dense_update(
    form: str, values: Callable[[int], dict[str, Any]]
) -> None:
    """Row by row from the whole history in every step, or when it is read: the same
    bits of p, m and v, whatever changed on the way."""
    value, rows, first, second = dense(values)
    made = run(FORMS[form], values)
    assert torch.equal(now(FORMS[form], made), value)
    for found, wanted in zip(
        (made.rows, made.first, made.second), (rows, first, second), strict=True
    ):
        assert torch.equal(found, wanted)


def lost_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One idle step out of two hundred is not counted."""
    age = idle.age

    def forgets(factors: Tensor, schedule: Schedule) -> None:
        if schedule.step != 200:
            age(factors, schedule)

    monkeypatch.setattr(idle, "age", forgets)


def early_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows rest when there is still a little to come."""
    monkeypatch.setattr(idle, "REST", 2.0**-12)


def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows never recentre."""
    monkeypatch.setattr(idle, "SPREAD", 1e9)


@pytest.mark.parametrize("mutant", [lost_step, early_rest, slow(no_events)])
def test_the_comparison_notices(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is for: each of these changes some bit."""
    value, *_ = dense(wild)
    mutant(monkeypatch)
    assert not torch.equal(now(adam, run(adam, wild)), value)


@pytest.mark.skipif("kernel" not in FORMS, reason="numba is not installed")
@pytest.mark.parametrize(
    ("shadow", "values", "lazy"),
    [
        (torch.bfloat16, wild, False),
        (torch.float16, wild, True),
        pytest.param(None, usual, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, usual, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, wild, True, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_is_the_plain_form(
    shadow: torch.dtype | None, values: Callable[[int], dict[str, Any]], lazy: bool
) -> None:
    """In every bit of state, 16-bit copy and value."""
    plain, fast = (
        run(FORMS[n], values, lazy=lazy, shadow=shadow) for n in ("plain", "kernel")
    )
    assert equal(plain, fast)
    if shadow is not None:
        assert plain.shadow is not None
        assert fast.shadow is not None
        assert torch.equal(plain.shadow, fast.shadow)
    dtype = shadow or torch.float32
    assert torch.equal(now(adam, plain, dtype), now(FORMS["kernel"], fast, dtype))


@pytest.mark.skipif("kernel" not in FORMS, reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_rounds_to_16_bits_as_torch_does(dtype: torch.dtype) -> None:
    """Ties, denormals, overflow, infinities and NaN, and random bits."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (64, 4096), generator=generator)
    some = bits.int().view(torch.float32)
    tie = torch.arange(4096).short().view(torch.bfloat16).float()
    edge = torch.tensor([65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-14])
    some[0], some[1, :6], some[2, :6] = tie * (1 + 2.0**-9), edge, -edge
    some[3, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    found, wanted = now(FORMS["kernel"], table(rows=some), dtype), some.to(dtype)
    is_nan = wanted.isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(
        found.view(torch.int16)[~is_nan], wanted.view(torch.int16)[~is_nan]
    )


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "usual": ({}, 1e-9),
    "weight decay": ({"weight_decay": 0.1}, 1e-9),
    "of the harness": ({"betas": (0.9, 0.98), "eps": 1e-6}, 1e-7),
    "fast squares": ({"betas": (0.9, 0.95)}, 1e-9),
    "slow mean": ({"betas": (0.99, 0.999)}, 1e-9),
}


def errors(
    values: dict[str, Any], tiny: float, form: ModuleType, steps: int
) -> dict[str, tuple[float, float]]:
    """Distance from AdamW in float64 of torch's in float32, and of ours."""
    rows, width = 16, 64
    generator = torch.Generator().manual_seed(4)
    begin = 0.02 * torch.randn(rows, width, generator=generator)
    near_eps = torch.arange(width) % 4 == 0
    size = torch.where(near_eps, tiny, 1e-4)
    exact = torch.nn.Parameter(begin.double())
    single = torch.nn.Parameter(begin.clone())
    options = USUAL | {"lr": 1e-3} | values
    theirs = [torch.optim.AdamW([p], foreach=False, **options) for p in (exact, single)]
    made, schedule = table(rows=begin), Schedule()
    worst = {"usual": [0.0, 0.0], "near eps": [0.0, 0.0]}
    for step in range(steps):
        touched = torch.rand(rows, generator=generator) < torch.linspace(
            0.002, 0.5, rows
        )
        ids = (touched | (step == 0)).nonzero()[:, 0]
        gradient = size * torch.randn(len(ids), width, generator=generator)
        whole = torch.zeros(rows, width)
        whole[ids] = gradient
        for parameter, optimizer in zip((exact, single), theirs, strict=True):
            parameter.grad = whole.to(parameter.dtype)
            optimizer.step()
        schedule.add(**options)
        form.advance(made, ids, gradient, schedule, idle=True)
        if step % 20 == 19:
            for k, found in enumerate((single.detach(), now(form, made))):
                error = (found.double() - exact.detach()).abs()
                for name, where in (("usual", ~near_eps), ("near eps", near_eps)):
                    worst[name][k] = max(worst[name][k], error[:, where].max().item())
    return {name: (a, b) for name, (a, b) in worst.items()}


@pytest.mark.parametrize("case", CASES)
def test_it_is_adamw(case: str) -> None:
    """No further from AdamW in float64 than three times torch's float32, five where
    gradients are about eps; without warm-up, where eps weighs most."""
    found = errors(*CASES[case], FORMS.get("kernel", adam), steps=500)
    for name, limit in (("usual", 3), ("near eps", 5)):
        of_torch, ours = found[name]
        assert ours <= limit * of_torch, found


def test_without_the_terms_in_eps_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polynomial cut to its first coefficient is too far off near eps."""
    cut = idle.POWERS.copy()
    cut[1:] = 0
    monkeypatch.setattr(idle, "POWERS", cut)
    of_torch, ours = errors({}, 1e-9, adam, steps=100)["near eps"]
    assert ours > 5 * of_torch


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_a_gradient_counts_where_its_square_is_a_normal_number(beta2: float) -> None:
    """As soon as (1 - beta2) g^2, which is added to v, is no denormal number."""
    schedule = Schedule()
    schedule.add(**USUAL | {"betas": (0.9, beta2)}, lr=1e-4)
    least = adam.smallest_gradient(schedule)
    normal = torch.finfo(torch.float32).tiny
    assert (1 - beta2) * least**2 == pytest.approx(normal, rel=1e-6)


@pytest.mark.parametrize("form", list(FORMS)[-1:])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gap", [1, REST - 1, REST, REST + 1, slow(5000)])
def test_a_gap_of_any_length_is_adamws(
    form: str, gap: int, weight_decay: float
) -> None:
    """Two gradients with a gap between them, of rows of all sizes."""
    options = USUAL | {"lr": 1e-4, "weight_decay": weight_decay}
    begin = start() * 0.1
    parameter = torch.nn.Parameter(begin.double())
    optimizer = torch.optim.AdamW([parameter], foreach=False, **options)
    made, schedule = table(rows=begin), Schedule()
    gradient = 1e-4 * torch.randn(
        ROWS, WIDTH, generator=torch.Generator().manual_seed(5)
    )
    for step in range(gap + 2):
        is_idle = 0 < step <= gap
        parameter.grad = gradient.double() * (not is_idle)
        optimizer.step()
        schedule.add(**options)
        ids, some = (SOURCE[:0], gradient[:0]) if is_idle else (SOURCE, gradient)
        FORMS[form].advance(made, ids, some, schedule, idle=True)
    wanted = parameter.detach()
    torch.testing.assert_close(
        now(FORMS[form], made).double(), wanted, rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("form", list(FORMS)[-1:])
def test_a_row_stops_changing_once_its_last_gradient_has_faded(form: str) -> None:
    """After H idle steps m is 0 and, without decay, the row's value stands still."""
    made, schedule = table(), Schedule()
    ones, values = torch.ones(ROWS, WIDTH), []
    for step in range(REST + 20):
        schedule.add(**USUAL, lr=1e-3)
        ids, some = (SOURCE, ones) if step == 0 else (SOURCE[:0], ones[:0])
        FORMS[form].advance(made, ids, some, schedule, idle=True)
        values.append(now(FORMS[form], made))
        assert bool((made.first == 0).all()) == (step >= REST), step
    assert (made.updated_at == REST).all()
    assert torch.equal(values[-1], values[REST - 1])
    assert not torch.equal(values[9], values[8])


@forms
def test_the_lazy_update_is_torchs_sparse_adam(form: str) -> None:
    made, schedule = table(), Schedule(idle=False)
    parameter = torch.nn.Parameter(start())
    optimizer = torch.optim.SparseAdam([parameter], lr=1.0)
    generator = torch.Generator().manual_seed(6)
    for step in range(100):
        ids = (torch.rand(ROWS, generator=generator) < 0.1).nonzero()[:, 0]
        gradient = torch.randn(len(ids), WIDTH, generator=generator)
        parameter.grad = torch.sparse_coo_tensor(
            ids[None], gradient, (ROWS, WIDTH), check_invariants=True
        )
        optimizer.param_groups[0]["lr"] = usual(step)["lr"]
        optimizer.step()
        schedule.add(**usual(step))
        FORMS[form].advance(made, ids, gradient, schedule, idle=False)
    # It adds eps before, we after dividing by the root of the bias correction.
    torch.testing.assert_close(made.rows, parameter.detach(), rtol=1e-3, atol=1e-3)


@forms
def test_where_every_row_has_a_gradient_both_updates_are_one(form: str) -> None:
    """Bit for bit, as no step is idle."""
    made = []
    for lazy in (True, False):
        one, schedule = table(), Schedule(idle=not lazy)
        for step, (ids, gradient) in enumerate(gradients(share=2.0, steps=20)):
            schedule.add(**wild(step))
            FORMS[form].advance(one, ids, gradient, schedule, idle=not lazy)
        made.append(one)
    assert torch.equal(made[0].rows[1:], made[1].rows[1:])


@forms
def test_rows_without_a_gradient_so_far_stand_still(form: str) -> None:
    made, schedule = table(), Schedule()
    before = made.rows.clone()
    for step in range(3):
        schedule.add(**usual(step))
        one = torch.tensor([3])
        FORMS[form].advance(made, one, torch.ones(1, WIDTH), schedule, idle=True)
    assert (now(FORMS[form], made) != before).any(1).nonzero().flatten().tolist() == [3]


@forms
def test_what_is_not_finite_stays_visible(form: str) -> None:
    """A gradient that is NaN or infinite makes the row so, as torch's AdamW does."""
    made, schedule = table(), Schedule()
    for bad in (torch.nan, torch.inf):
        schedule.add(**usual(0))
        gradient = torch.full((1, WIDTH), bad)
        FORMS[form].advance(made, torch.tensor([7]), gradient, schedule, idle=True)
        assert not now(FORMS[form], made)[7].isfinite().any()
