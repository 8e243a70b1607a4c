"""`meft.sparse.adam` in one pass over memory on all cores, compiled by numba.

Each row is read and written once, however many idle steps it took, and its 16-bit copy
is written in the same pass. The results have the same bits as those of the plain
implementation: both execute the same operations in the same order. The module is not
imported where numba is missing.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from meft.sparse import adam, idle
from meft.sparse.adam import RowTable
from meft.sparse.idle import (
    CENTRE,
    FADE,
    MEAN,
    NEGLIGIBLE,
    ROOT,
    SHRINK,
    SMALLEST,
    SMALLEST_ROOT,
    SUMS,
)
from meft.sparse.schedule import Schedule
from meft.sparse.shapes import Ids, SomeRows

BLOCK = 512
"""Elements of a row whose 16-bit copy is written while they are in the L1 cache."""
WIDE, BFLOAT16, FLOAT16 = range(3)
"""Output formats: float32, or one of two 16-bit dtypes."""
KINDS = {torch.float32: WIDE, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_f32, _u32, _u16 = np.float32, np.uint32, np.uint16
_ZERO = _f32(0)


def advance(
    table: RowTable,
    ids: Ids,
    gradient: SomeRows,
    schedule: Schedule,
    *,
    idle: bool,
) -> None:
    """Take the schedule's last step, with the same bits as `meft.sparse.adam.advance`.

    Args:
        table: the table to change.
        ids: the rows that have a gradient, distinct, `some`.
        gradient: the gradient of these rows, float32, `some width`.
        schedule: the schedule whose last step is taken.
        idle: whether all other rows take an idle step.
    """
    _use_threads()
    s = schedule
    steps = (s.decay, s.size, s.root, s.eps, 1 - s.beta1, 1 - s.beta2)
    _advance(
        *(t.numpy() for t in (table.rows, table.first, table.second)),
        table.factors.numpy(),
        table.updated_at.numpy(),
        *_bits(table.shadow, table.rows),
        ids.numpy(),
        gradient.numpy(),
        *(_f32(scalar) for scalar in (*steps, adam.smallest_gradient(s))),
        (s.beta1, s.beta2, s.decay, s.sqrt_beta2, s.fading, s.weight, s.offset),
        *_choices(),
        _centre_of(s, idle),
        s.step,
        idle,
    )


def values(
    table: RowTable, ids: Ids, out: Float[Tensor, "places width"], places: Ids
) -> None:
    """Compute current values of rows, with the same bits as `meft.sparse.adam.values`.

    Args:
        table: the table to read.
        ids: which rows, `some`.
        out: the output, in its dtype.
        places: rows of `out`, one for each of `ids`.
    """
    _use_threads()
    bits, kind = _bits(out, out)
    _values(
        *(t.numpy() for t in (table.rows, table.first, table.second)),
        table.factors.numpy(),
        ids.numpy(),
        places.numpy(),
        out.numpy() if kind == WIDE else table.rows[:0].numpy(),
        bits,
        kind,
        idle.POWERS,
    )


due = adam.due
"""See `meft.sparse.adam.due`, which reads a few numbers per row."""


def _choices() -> tuple[Any, ...]:
    """Return the constants of `idle`.

    They are passed as arguments because numba's cache only detects changes of this
    file.
    """
    return idle.NODES, idle.POWERS, idle.REST, idle.SPREAD


def _use_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _centre_of(schedule: Schedule, idling: bool) -> float:
    return idle.centre_of(schedule) if idling else 1.0


def _bits(out: Tensor | None, like: Tensor) -> tuple[Any, int]:
    """Return 16-bit memory as integers, which numba supports, and its format."""
    if out is None or out.dtype == torch.float32:
        return np.empty((0, like.shape[1]), _u16), WIDE
    return out.view(torch.int16).numpy().view(_u16), KINDS[out.dtype]


# `no_type_check` keeps the type checker of the tests from wrapping numba functions.


@numba.njit(parallel=True, cache=True, error_model="numpy")
@no_type_check
def _advance(
    rows,
    first,
    second,
    factors,
    updated_at,
    shadow,
    kind,
    ids,
    gradient,
    decay,
    size,
    root,
    eps,
    rest1,
    rest2,
    from_new,
    scalars,
    nodes,
    powers,
    rest,
    spread,
    centre,
    step,
    is_idle,
):
    wide = rows.view(_u32)
    of_step = decay, size, root, eps, rest1, rest2, from_new
    for n in numba.prange(ids.size):
        i = ids[n]
        idle_steps = _idle_steps(factors[i], powers)
        of_row = _of_row(factors[i], scalars[0], scalars[1])
        moves = idle_steps[3] != 0
        for start in range(0, rows.shape[1], BLOCK):
            stop = min(start + BLOCK, rows.shape[1])
            p, m, v = rows[i, start:stop], first[i, start:stop], second[i, start:stop]
            g = gradient[n, start:stop]
            if kind == BFLOAT16:
                _step_and_narrow(
                    p,
                    m,
                    v,
                    g,
                    shadow[i, start:stop],
                    moves,
                    idle_steps,
                    of_row,
                    of_step,
                )
                continue
            if moves:
                for k in range(p.size):
                    p[k] = _moved(p[k], m[k], v[k], idle_steps)
            else:
                for k in range(p.size):
                    p[k] = p[k] * idle_steps[0]
            for k in range(p.size):
                p[k], m[k], v[k] = _stepped(p[k], m[k], v[k], g[k], of_row, of_step)
            if kind == FLOAT16:
                _narrow(wide[i, start:stop], shadow[i, start:stop], kind)
    if is_idle:
        has_gradient = np.zeros(rows.shape[0], np.bool_)
        for n in range(ids.size):
            has_gradient[ids[n]] = True
        due = _due(factors, has_gradient, scalars, rest, spread)
        for n in numba.prange(due.size):
            i = due[n]
            row = rows[i], first[i], second[i], factors[i]
            _settle(*row, powers, rest, centre)
        _age(factors, has_gradient, updated_at, scalars, nodes, step)
    for n in range(ids.size):
        i = ids[n]
        factors[i] = 0
        factors[i, SHRINK] = factors[i, MEAN] = factors[i, ROOT] = 1
        factors[i, FADE] = 1
        factors[i, CENTRE] = centre
        updated_at[i] = step


@numba.njit(error_model="numpy")
@no_type_check
def _step_and_narrow(p, m, v, g, bits, moves, idle_steps, of_row, of_step):
    """Take the step and write the bfloat16 copy in one loop; the most common case."""
    if moves:
        for k in range(p.size):
            at = _moved(p[k], m[k], v[k], idle_steps)
            at, by, under = _stepped(at, m[k], v[k], g[k], of_row, of_step)
            p[k], m[k], v[k] = at, by, under
            at = np.float32(at if at == at else np.nan)
            bits[k] = _bfloat16(at.view(np.uint32))
    else:
        for k in range(p.size):
            at = p[k] * idle_steps[0]
            at, by, under = _stepped(at, m[k], v[k], g[k], of_row, of_step)
            p[k], m[k], v[k] = at, by, under
            at = np.float32(at if at == at else np.nan)
            bits[k] = _bfloat16(at.view(np.uint32))


@numba.njit(error_model="numpy")
@no_type_check
def _age(factors, has_gradient, updated_at, scalars, nodes, step):
    """Take an idle step of all rows without a gradient."""
    beta1, _, decay, sqrt_beta2, fading, of_weight, offset = scalars
    for i in range(has_gradient.size):
        if has_gradient[i]:
            continue
        of_row = factors[i]
        shrink = of_row[SHRINK] * decay
        of_row[SHRINK] = shrink if shrink >= SMALLEST else 0.0
        of_row[FADE] *= fading
        mean = of_row[MEAN] * beta1
        root = max(of_row[ROOT] * sqrt_beta2, SMALLEST_ROOT)
        of_row[MEAN], of_row[ROOT] = mean, root
        sums = of_row[SUMS : SUMS + 7]
        if mean > 0:
            weight, middle = mean / root * of_weight, of_row[CENTRE]
            away = offset / root - middle
            for j in range(7):
                sums[j] = sums[j] * decay + weight / (away * nodes[j] + middle)
        else:
            for j in range(7):
                sums[j] = sums[j] * decay
        if (mean > 0 and of_weight > 0) or decay != 1:
            updated_at[i] = step


@numba.njit(error_model="numpy")
@no_type_check
def _due(factors, has_gradient, scalars, rest, spread):
    """Return the rows without a gradient that come to rest or recentre."""
    sqrt_beta2, offset = scalars[3], scalars[6]
    is_due = np.zeros(has_gradient.size, np.bool_)
    for i in range(has_gradient.size):
        root = max(factors[i, ROOT] * sqrt_beta2, SMALLEST_ROOT)
        middle = factors[i, CENTRE] * root
        is_far = offset > middle * spread or offset * spread < middle
        is_live = factors[i, MEAN] > 0 and not has_gradient[i]
        is_due[i] = is_live and (is_far or factors[i, FADE] <= rest)
    return is_due.nonzero()[0]


@numba.njit(error_model="numpy")
@no_type_check
def _settle(p, m, v, factors, powers, rest, centre):
    """Write the value of a row after its idle steps."""
    rests = factors[FADE] <= rest
    _now(p, m, v, factors, powers, p)
    of_row = _of_row(factors, 1.0, 1.0)
    for k in range(p.size):
        by, under = _faded(m[k], v[k], of_row)
        m[k] = _ZERO if rests else by
        v[k] = under
    factors[SHRINK] = factors[ROOT] = 1
    factors[MEAN] = 0.0 if rests else 1.0
    factors[CENTRE] = centre
    factors[SUMS:] = 0


@numba.njit(parallel=True, cache=True, error_model="numpy")
@no_type_check
def _values(rows, first, second, factors, ids, places, out, bits, kind, powers):
    for n in numba.prange(ids.size):
        i, place = ids[n], places[n]
        if kind == WIDE:
            _now(rows[i], first[i], second[i], factors[i], powers, out[place])
        else:
            some = np.empty(BLOCK, _f32)
            as_bits = some.view(_u32)
            for start in range(0, rows.shape[1], BLOCK):
                stop = min(start + BLOCK, rows.shape[1])
                p, m = rows[i, start:stop], first[i, start:stop]
                _now(p, m, second[i, start:stop], factors[i], powers, some[: p.size])
                _narrow(as_bits[: p.size], bits[place, start:stop], kind)


@numba.njit(error_model="numpy")
@no_type_check
def _now(p, m, v, factors, powers, out):
    """Compute the current value of part of a row."""
    idle_steps = _idle_steps(factors, powers)
    if idle_steps[3] != 0:
        for k in range(p.size):
            out[k] = _moved(p[k], m[k], v[k], idle_steps)
    else:
        for k in range(p.size):
            out[k] = p[k] * idle_steps[0]


@numba.njit(error_model="numpy")
@no_type_check
def _idle_steps(factors, powers):
    """Return the factors for p: D, c, the least m that counts, coefficients."""
    return (
        _f32(factors[SHRINK]),
        _f32(factors[CENTRE]),
        _f32(NEGLIGIBLE) / _f32(factors[MEAN]),
        _coefficient(factors, powers, 0),
        _coefficient(factors, powers, 1),
        _coefficient(factors, powers, 2),
        _coefficient(factors, powers, 3),
        _coefficient(factors, powers, 4),
        _coefficient(factors, powers, 5),
        _coefficient(factors, powers, 6),
    )


@numba.njit(error_model="numpy")
@no_type_check
def _coefficient(factors, powers, k):
    found = 0.0
    for j in range(7):
        found = found + factors[SUMS + j] * powers[k, j]
    return _f32(found)


@numba.njit(error_model="numpy")
@no_type_check
def _of_row(factors, beta1, beta2):
    """Return the factors for m and v, and the sizes below which these are 0."""
    mean = _f32(factors[MEAN] * beta1)
    square = factors[ROOT] * factors[ROOT] * beta2
    square = _f32(square) if square >= SMALLEST else _ZERO
    from_mean = _f32(NEGLIGIBLE) / _f32(factors[MEAN])
    return mean, square, from_mean, _f32(SMALLEST) / square


@numba.njit(error_model="numpy")
@no_type_check
def _moved(at, by, under, idle_steps):
    """Return p after idle steps."""
    shrink, c, from_mean, a0, a1, a2, a3, a4, a5, a6 = idle_steps
    by = _ZERO if abs(by) < from_mean else by
    x = c / (np.sqrt(under) + c)
    phi = a6 * x + a5
    phi = (((phi * x + a4) * x + a3) * x + a2) * x + a1
    phi = phi * x + a0
    return at * shrink - by * (x * phi)


@numba.njit(error_model="numpy")
@no_type_check
def _faded(by, under, of_row):
    """Return m and v after idle steps."""
    mean, square, from_mean, from_square = of_row
    by = _ZERO if abs(by) < from_mean else by
    under = _ZERO if under < from_square else under * square
    return by * mean, under


@numba.njit(error_model="numpy")
@no_type_check
def _stepped(at, by, under, new, of_row, of_step):
    """Return p, m and v after a step with a gradient."""
    decay, size, root, eps, rest1, rest2, from_new = of_step
    by, under = _faded(by, under, of_row)
    new = _ZERO if abs(new) < from_new else new
    by = by + new * rest1
    under = under + new * new * rest2
    return at * decay - by * size / (np.sqrt(under) * root + eps), by, under


@numba.njit(error_model="numpy")
@no_type_check
def _narrow(wide, out, kind):
    """Convert float32 bits to 16 bits, rounded to nearest, ties to even."""
    if kind == BFLOAT16:
        for k in range(wide.size):
            is_nan = (wide[k] & _u32(0x7FFFFFFF)) > _u32(0x7F800000)
            out[k] = _u16(0x7FC0) if is_nan else _bfloat16(wide[k])
    else:
        for k in range(wide.size):
            out[k] = _half(wide[k])


@numba.njit(error_model="numpy", inline="always")
@no_type_check
def _bfloat16(b):
    """Convert bits of a float32, except a NaN that rounding would turn into 0."""
    odd = (b >> _u32(16)) & _u32(1)
    return _u16((b + _u32(0x7FFF) + odd) >> _u32(16))


@numba.njit(error_model="numpy", inline="always")
@no_type_check
def _half(b):
    sign = (b >> _u32(16)) & _u32(0x8000)
    b = np.uint32(b & _u32(0x7FFFFFFF))  # numba would continue in 64 bits
    odd = (b >> _u32(13)) & _u32(1)
    # The exponent's bias is 127 in 32 bits and 15 in 16.
    normal = (b - _u32((127 - 15) << 23) + _u32(0xFFF) + odd) >> _u32(13)
    # Below 2^-14, float16 has only multiples of 2^-24: adding 1/2 rounds to these.
    lifted = np.float32(b.view(np.float32) + np.float32(0.5))
    small = lifted.view(np.uint32) - _u32(0x3F000000)
    found = small if b < _u32(113 << 23) else normal
    found = _u32(0x7C00) if b >= _u32(0x47800000) else found
    found = _u32(0x7E00) if b > _u32(0x7F800000) else found
    return _u16(found | sign)
