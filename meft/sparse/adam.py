"""AdamW on some rows of a table, with three ways to update the other rows.

One step on one number, with gradient g (Loshchilov & Hutter, ICLR 2019):

    p = decay p                                 decay = 1 - lr * weight_decay
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - size m / (root sqrt(v) + eps)       size = lr / (1 - beta1^t)
                                                root = 1 / sqrt(1 - beta2^t)

An idle row, a row without a gradient, has g = 0 and is still moved by m:

    dense     every row is updated in every step
    lazy      an idle row and its moments do not change (torch's SparseAdam)
    catchup   an idle row is updated when it is next read or has a gradient

`dense` and `catchup` are the same function, bit for bit: a table holds a row as it was
after its last gradient, and its current value follows from that and from the factors of
the steps since (`meft.sparse.idle`), however often it was read in between.

This module is the plain implementation, for any device. It is the reference of
`meft.sparse.adam_kernel`, which computes the same on a CPU in one pass over memory.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from meft.sparse import idle as idling
from meft.sparse.idle import Factors
from meft.sparse.schedule import Schedule
from meft.sparse.shapes import AllRows, Ids, SomeRows, Steps

UPDATES = ("dense", "lazy", "catchup")


PIECE = 1024
"""Number of rows that are processed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """Rows and their Adam state as of each row's last gradient, changed in place."""

    rows: AllRows
    first: AllRows
    """m, the mean gradient."""
    second: AllRows
    """v, the mean squared gradient."""
    factors: Factors
    """Effect of the idle steps since then on each row: `meft.sparse.idle`."""
    updated_at: Steps
    """The last step that changed the value of a row."""
    shadow: Float[Tensor, "rows width"] | None = None
    """16-bit copy of rows that `advance` writes along with them."""


def advance(
    table: RowTable,
    ids: Ids,
    gradient: SomeRows,
    schedule: Schedule,
    *,
    idle: bool,
) -> None:
    """Take the schedule's last step.

    Args:
        table: the table to change.
        ids: the rows that have a gradient, distinct, `some`.
        gradient: the gradient of these rows, float32, `some width`.
        schedule: the schedule whose last step is taken.
        idle: whether all other rows take an idle step (`dense`, `catchup`) or none
            (`lazy`).
    """
    for some, of_some in zip(ids.split(PIECE), gradient.split(PIECE), strict=True):
        _step(table, some, of_some, schedule)
    if idle:
        others = torch.ones_like(table.updated_at, dtype=torch.bool)
        others[ids] = False
        _idle_step(table, others.nonzero()[:, 0], schedule)
    restart_moved(table, ids, schedule, idle=idle)


def restart_moved(table: RowTable, ids: Ids, schedule: Schedule, *, idle: bool) -> None:
    """Start the factors of rows that had a gradient in the schedule's last step.

    Args:
        table: the table, of which only factors and steps change.
        ids: the rows that had a gradient, `some`.
        schedule: the schedule whose last step they took.
        idle: whether rows take idle steps.
    """
    mine = table.factors[ids]
    moves = torch.ones_like(ids, dtype=torch.bool)
    idling.restart(mine, idling.centre_of(schedule) if idle else 1.0, moves)
    mine[:, idling.FADE] = 1
    table.factors[ids] = mine
    table.updated_at[ids] = schedule.step


def due(table: RowTable, ids: Ids, schedule: Schedule) -> Int[Tensor, " due"]:
    """Return the idle rows that have to be settled in the schedule's last step.

    Args:
        table: the table, whose factors are as of before that step.
        ids: idle rows, `some`.
        schedule: the schedule.
    """
    rests, recentres = idling.events(table.factors[ids], schedule)
    return ids[rests | recentres]


def settle(table: RowTable, ids: Ids, s: Schedule) -> None:
    """Write the values of rows after all idle steps before the last one.

    Args:
        table: the table to change, whose factors are as of before that step.
        ids: rows that are `due`, `some`.
        s: the schedule.
    """
    table.rows[ids] = _rows_now(table, ids)
    rests, _ = idling.events(table.factors[ids], s)
    restart(table, ids, s)
    table.first[ids] = table.first[ids].masked_fill(rests[:, None], 0.0)
    table.factors[ids, idling.MEAN] = (~rests).double()


def values(
    table: RowTable, ids: Ids, out: Float[Tensor, "places width"], places: Ids
) -> None:
    """Compute the current values of rows; the table does not change.

    Args:
        table: the table to read.
        ids: which rows, `some`.
        out: the output, in its dtype: float32, bfloat16 or float16. It may be
            `table.rows` with `places` equal to `ids`.
        places: rows of `out`, one for each of `ids`.
    """
    for some, there in zip(ids.split(PIECE), places.split(PIECE), strict=True):
        out[there] = _rows_now(table, some).to(out.dtype)


def _step(table: RowTable, ids: Ids, gradient: SomeRows, s: Schedule) -> None:
    factors = table.factors[ids]
    rows = _rows_now(table, ids)
    first, second = idling.moments_now(
        table.first[ids], table.second[ids], factors, s.beta1, s.beta2
    )
    is_lost = gradient.abs() < smallest_gradient(s)
    gradient = torch.where(is_lost, 0.0, gradient)
    first = first + gradient * (1 - s.beta1)
    second = second + gradient * gradient * (1 - s.beta2)
    rows = rows * s.decay - first * s.size / (idling.sqrt(second) * s.root + s.eps)
    table.rows[ids], table.first[ids], table.second[ids] = rows, first, second
    if table.shadow is not None:
        table.shadow[ids] = rows.to(table.shadow.dtype)


def _idle_step(table: RowTable, ids: Ids, s: Schedule) -> None:
    for some in due(table, ids, s).split(PIECE):
        settle(table, some, s)
    factors = table.factors[ids]
    idling.age(factors, s)
    table.factors[ids] = factors
    moves = (factors[:, idling.MEAN] > 0) & (s.weight > 0) | (s.decay != 1)
    table.updated_at[ids] = table.updated_at[ids].masked_fill(moves, s.step)


def restart(table: RowTable, ids: Ids, s: Schedule) -> None:
    """Start the factors of rows again from their current values and moments.

    Args:
        table: the table to change.
        ids: which rows, `some`.
        s: the schedule.
    """
    factors = table.factors[ids]
    table.first[ids], table.second[ids] = idling.moments_now(
        table.first[ids], table.second[ids], factors
    )
    idling.restart(factors, idling.centre_of(s), factors[:, idling.MEAN] > 0)
    table.factors[ids] = factors


def _rows_now(table: RowTable, ids: Ids) -> SomeRows:
    at_last = table.rows[ids], table.first[ids], table.second[ids]
    return idling.rows_now(*at_last, table.factors[ids])


def smallest_gradient(s: Schedule) -> float:
    """Return the size below which a gradient counts as 0.

    The contribution of such a gradient to v would be denormal.
    """
    return float(np.float32(math.sqrt(idling.SMALLEST / (1 - s.beta2))))
