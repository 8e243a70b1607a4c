"""Effect of idle steps on a row: a closed form in its last gradient.

A row without a gradient takes AdamW's step with g = 0. After its last gradient it holds
(p, m, v); after j = 1, 2, ... idle steps it holds

    m_j = M m        M  product of beta1 since then
    v_j = Q^2 v      Q  product of sqrt(beta2)
    p_j = D p - m * sum_i w_i / (sqrt(v) + e_i)
                     D    product of decay = 1 - lr * weight_decay
                     w_i  lr sqrt(1 - beta2^t) / (1 - beta1^t) * M / Q of step i, times
                          the decay of the steps after it
                     e_i  eps sqrt(1 - beta2^t) / Q of step i

The sum is over scalars of the schedule and depends on an element only through v. With x
= c / (sqrt(v) + c), which is in [0, 1], it is

    x * phi(x),      phi(x) = sum_i w_i / (c + x (e_i - c))

and phi is smooth as long as all e_i are within a factor of `SPREAD` of the centre c.
Its exact values at a few nodes are therefore kept and updated, one addition per step,
and an element evaluates the polynomial through them: the cost of a row does not depend
on the number of its idle steps. x = 0 is a node, as almost every element is close to it
(sqrt(v) >> eps).

A row's factors depend on the schedule alone. Two events write the row's current value
by the formula and reset its factors, in the step in which they occur, whether or not
the row is read:

    rest        M / Q since the gradient has fallen to `REST`: m is 0 from now on
    recentre    the next e is further than `SPREAD` from c (eps or beta2 changed)

This module is the plain implementation on tensors, `meft.sparse.adam_kernel` the fast
one; both give the same bits. Factors are float64, values per element are float32.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meft.sparse.schedule import Schedule
from meft.sparse.shapes import SomeRows

DEGREE = 6
"""Degree of the polynomial in x."""
NODES = (1 - np.cos(np.pi * np.arange(DEGREE + 1) / DEGREE)) / 2
"""Nodes of phi: extrema of a Chebyshev polynomial on [0, 1], including 0 and 1."""
POWERS = np.linalg.inv(np.vander(NODES, increasing=True))
"""Coefficient k of the polynomial is `POWERS[k] @ phi(NODES)`."""
POWERS[0] = np.eye(DEGREE + 1)[0]

SHRINK, MEAN, ROOT, FADE, CENTRE, SUMS = range(6)
"""Columns of a table of factors: D, M, Q, M / Q since the gradient, c, phi at nodes."""
NUM_FACTORS = SUMS + DEGREE + 1

REST = 2.0**-34
SPREAD = 2.0
SMALLEST = 2.0**-126
"""Smallest normal float32; smaller results take a hundred times as long."""
NEGLIGIBLE = 2.0**-100
"""Size below which a mean gradient counts as 0."""
SMALLEST_ROOT = 2.0**-64
"""Lower bound of Q; v is 0 at this value."""

Factors = Float[Tensor, "rows factors"]
Flags = Bool[Tensor, " rows"]


def new_factors(num_rows: int, device: torch.device | None = None) -> Factors:
    """Return factors of rows without any gradient so far, which only decay."""
    made = torch.zeros(num_rows, NUM_FACTORS, dtype=torch.double, device=device)
    made[:, [SHRINK, ROOT, CENTRE]] = 1
    return made


def restart(factors: Factors, centre: float, is_live: Flags) -> None:
    """Reset factors in place, for rows that hold their current (p, m, v).

    Args:
        factors: the factors to change, `rows factors`.
        centre: c of the following sums.
        is_live: whether m is other than 0, `rows`.
    """
    # One by one: a list of columns would be copied to the device.
    factors[:, SHRINK] = 1
    factors[:, ROOT] = 1
    factors[:, MEAN] = is_live.double()
    factors[:, CENTRE] = centre
    factors[:, SUMS:] = 0


def events(factors: Factors, schedule: Schedule) -> tuple[Flags, Flags]:
    """Return which rows rest before the schedule's last step, and which recentre."""
    is_live = factors[:, MEAN] > 0
    rests = is_live & (factors[:, FADE] <= REST)
    root = (factors[:, ROOT] * schedule.sqrt_beta2).clamp(min=SMALLEST_ROOT)
    middle = factors[:, CENTRE] * root
    is_far = (schedule.offset > middle * SPREAD) | (schedule.offset * SPREAD < middle)
    return rests, is_live & is_far & ~rests


def age(factors: Factors, schedule: Schedule) -> None:
    """Take the schedule's last step as an idle step, in place."""
    shrink = factors[:, SHRINK] * schedule.decay
    factors[:, SHRINK] = shrink.where(shrink >= SMALLEST, 0.0)
    factors[:, MEAN] *= schedule.beta1
    factors[:, FADE] *= schedule.fading
    root = (factors[:, ROOT] * schedule.sqrt_beta2).clamp(min=SMALLEST_ROOT)
    factors[:, ROOT] = root
    weight = factors[:, MEAN] / root * schedule.weight
    centre = factors[:, CENTRE]
    # Dividing a number by a tensor would compute the reciprocal and multiply.
    away = torch.full_like(root, schedule.offset) / root - centre
    for k, node in enumerate(NODES.tolist()):
        term = weight / (away * node + centre)
        factors[:, SUMS + k] = factors[:, SUMS + k] * schedule.decay + term


def rows_now(
    rows: SomeRows, first: SomeRows, second: SomeRows, factors: Factors
) -> SomeRows:
    """Return the current p of rows.

    Args:
        rows: p after the last gradient, `some width`.
        first: m after the last gradient, `some width`.
        second: v after the last gradient, `some width`.
        factors: the factors of these rows, `some factors`.
    """
    sums = factors[:, SUMS:].T
    shrink, centre = _column(factors[:, SHRINK]), _column(factors[:, CENTRE])
    x = centre / (sqrt(second) + centre)
    phi = torch.zeros_like(x)
    for powers in reversed(POWERS.tolist()):
        # The additions are separate: a matrix product has its own order of summation.
        coefficient = torch.zeros_like(sums[0])
        for power, values in zip(powers, sums, strict=True):
            coefficient = coefficient + values * power
        phi = phi * x + _column(coefficient)
    moved = rows * shrink - _mean(first, factors) * (x * phi)
    return torch.where(_column(sums[0]) != 0, moved, rows * shrink)


def moments_now(
    first: SomeRows,
    second: SomeRows,
    factors: Factors,
    beta1: float = 1.0,
    beta2: float = 1.0,
) -> tuple[SomeRows, SomeRows]:
    """Return the current m and v of rows, multiplied by the betas of one more step.

    Args:
        first: m after the last gradient, `some width`.
        second: v after the last gradient, `some width`.
        factors: the factors of these rows, `some factors`.
        beta1: factor on m.
        beta2: factor on v.
    """
    mean = _mean(first, factors) * _column(factors[:, MEAN] * beta1)
    square = factors[:, ROOT] * factors[:, ROOT] * beta2
    share = _column(square.where(square >= SMALLEST, 0.0))
    is_lost = second < torch.full_like(share, SMALLEST) / share
    return mean, torch.where(is_lost, 0.0, second * share)


def sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root, also where torch's own is not."""
    return x.sqrt() if x.is_cuda else x.double().sqrt().float()


def centre_of(schedule: Schedule) -> float:
    """Return c for rows whose last gradient was in the schedule's last step.

    It is the e of the step by which most of the effect of the following idle steps has
    occurred, limited to a multiple of the e of the next step.
    """
    ahead = 1 / (1 - schedule.beta1)
    rooted = math.sqrt(1 - schedule.beta2 ** (schedule.step + ahead))
    centre: float = schedule.eps * rooted * schedule.beta2 ** (-ahead / 2)
    return min(centre, 1.5 * schedule.offset)


def _mean(first: SomeRows, factors: Factors) -> SomeRows:
    """Return m of the last gradient, 0 where M m is negligible."""
    mean = _column(factors[:, MEAN])
    is_lost = first.abs() < torch.full_like(mean, NEGLIGIBLE) / mean
    return torch.where(is_lost, 0.0, first)


def _column(of_rows: Float[Tensor, " rows"]) -> Float[Tensor, "rows 1"]:
    return of_rows.float()[:, None]
