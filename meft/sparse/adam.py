"""AdamW on some rows of a table, with three answers to what happens to the others.

One step on one number, with gradient g (Loshchilov & Hutter, ICLR 2019):

    p = decay p                                 decay = 1 - lr * weight_decay
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - size m / (root sqrt(v) + eps)       size = lr / (1 - beta1^t)
                                                root = 1 / sqrt(1 - beta2^t)

An idle row, one without a gradient, has g = 0 and moves on by what m remembers:

    dense     every row takes every step
    lazy      an idle row stands still, and so do its moments (torch's SparseAdam)
    catchup   an idle row takes its steps later, when it is next read or has a gradient:
              the same steps in the same order, so the same bits as `dense`

`advance` is the plain form, held against `meft.sparse.adam_kernel`, which does the same
in one pass over memory.
"""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

UPDATES = ("dense", "lazy", "catchup")

Rows = Float[Tensor, "rows width"]
SomeRows = Float[Tensor, "some width"]


@dataclass(kw_only=True, slots=True)
class Schedule:
    """The factors of every step so far; step t is entry t - 1."""

    decay: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    root: list[float] = field(default_factory=list)
    beta1: list[float] = field(default_factory=list)
    beta2: list[float] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps so far."""
        return len(self.size)

    @property
    def decays(self) -> bool:
        """Whether any step shrinks a row that never had a gradient."""
        return any(decay != 1 for decay in self.decay)

    def add(
        self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        """One more step, with these values of the optimizer's group."""
        t = self.step + 1
        beta1, beta2 = betas
        self.decay.append(1 - lr * weight_decay)
        self.size.append(lr / (1 - beta1**t))
        self.root.append((1 - beta2**t) ** -0.5)
        self.beta1.append(beta1)
        self.beta2.append(beta2)
        self.eps.append(eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows and their Adam state, in place."""

    rows: Rows
    first: Rows
    """m, the mean gradient."""
    second: Rows
    """v, the mean squared gradient."""
    updated_at: Int[Tensor, " rows"]
    """The step that each row stands at."""


def advance(
    table: Table,
    ids: Int[Tensor, " some"],
    gradient: SomeRows | None,
    schedule: Schedule,
    *,
    idle: bool,
) -> None:
    """Bring rows to the schedule's last step.

    Args:
        table: what to change.
        ids: which rows; distinct.
        gradient: of these rows in the last step; None if that too is idle.
        schedule: all steps, the last included.
        idle: whether idle steps are taken (`dense`, `catchup`) or left out (`lazy`).
    """
    end = schedule.step if gradient is None else schedule.step - 1
    rows, first, second = table.rows[ids], table.first[ids], table.second[ids]
    if idle:
        stands_at = table.updated_at[ids]
        # Rows that stand at one step are moved on together.
        for step in stands_at.unique().tolist():
            if step == 0 and not schedule.decays:
                continue  # no gradient yet: nothing to remember
            here = stands_at == step
            some = rows[here], first[here], second[here]
            for t in range(step, end):
                _step(*some, None, schedule, t)
            rows[here], first[here], second[here] = some
    if gradient is not None:
        _step(rows, first, second, gradient, schedule, end)
    table.rows[ids], table.first[ids], table.second[ids] = rows, first, second
    table.updated_at[ids] = schedule.step


def _step(
    rows: SomeRows,
    first: SomeRows,
    second: SomeRows,
    gradient: SomeRows | None,
    s: Schedule,
    t: int,
) -> None:
    rows *= s.decay[t]
    first *= s.beta1[t]
    second *= s.beta2[t]
    if gradient is not None:
        first += gradient * (1 - s.beta1[t])
        second += gradient * gradient * (1 - s.beta2[t])
    rows -= first * s.size[t] / (second.sqrt() * s.root[t] + s.eps[t])
