"""`meft.sparse.adam.advance` in one pass over memory, by all cores, compiled by numba.

Each row is read and written once, however many idle steps it takes on the way, and its
16-bit copy is written while it is at hand. Never imported where numba is missing.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from meft.sparse.adam import Schedule, SomeRows, Table


def advance(
    table: Table,
    ids: Int[Tensor, " some"],
    gradient: SomeRows | None,
    schedule: Schedule,
    *,
    idle: bool,
) -> None:
    """As the plain one, in the same bits."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    _advance(
        table.rows.numpy(),
        table.first.numpy(),
        table.second.numpy(),
        table.updated_at.numpy(),
        ids.numpy(),
        (table.rows[:0] if gradient is None else gradient).numpy(),
        gradient is not None,
        *(np.asarray(column, np.float32) for column in _columns(schedule)),
        np.int64(schedule.step),
        idle,
        schedule.decays,
    )


def _columns(schedule: Schedule) -> tuple[list[float], ...]:
    s = schedule
    rest1, rest2 = ([1 - beta for beta in betas] for betas in (s.beta1, s.beta2))
    return s.decay, s.size, s.root, s.beta1, rest1, s.beta2, rest2, s.eps


# `no_type_check` keeps the type checker of the tests from wrapping what numba compiles.


@numba.njit(parallel=True, cache=True, error_model="numpy")
@no_type_check
def _advance(
    rows,
    first,
    second,
    updated_at,
    ids,
    gradient,
    has_gradient,
    decay,
    size,
    root,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    step,
    idle,
    decays,
):
    end = step - 1 if has_gradient else step
    for n in numba.prange(ids.size):
        i = ids[n]
        p, m, v = rows[i], first[i], second[i]
        if idle and (updated_at[i] > 0 or decays):
            for t in range(updated_at[i], end):
                # Into variables: for all the compiler knows, tables overlap.
                keep, by, under = decay[t], size[t], root[t]
                b1, b2, floor = beta1[t], beta2[t], eps[t]
                for c in range(p.size):
                    mean, square = m[c] * b1, v[c] * b2
                    m[c], v[c] = mean, square
                    p[c] = p[c] * keep - mean * by / (np.sqrt(square) * under + floor)
        if has_gradient:
            g = gradient[n]
            keep, by, under = decay[end], size[end], root[end]
            b1, r1, b2, r2 = beta1[end], rest1[end], beta2[end], rest2[end]
            floor = eps[end]
            for c in range(p.size):
                mean = m[c] * b1 + g[c] * r1
                square = v[c] * b2 + g[c] * g[c] * r2
                m[c], v[c] = mean, square
                p[c] = p[c] * keep - mean * by / (np.sqrt(square) * under + floor)
        updated_at[i] = step
