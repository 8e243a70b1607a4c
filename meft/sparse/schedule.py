"""The steps of AdamW as numbers: a `Schedule` counts them and holds the last one.

It receives all values of a parameter group in every step, so any of them may change at
any time. It keeps no earlier steps: a row's own factors contain their effect on the row
(`meft.sparse.idle`).
"""

import math
from dataclasses import dataclass

from meft.errors import ConfigError

SMALLEST_EPS = 1e-15
"""Lower bound of eps; below it, gradients that count as 0 would matter."""


@dataclass(kw_only=True, slots=True)
class Schedule:
    """The number of steps so far, and the factors of the last one."""

    step: int = 0
    """Steps so far; t of the last one."""
    idle: bool = True
    """Whether rows without a gradient take steps, which restricts betas and eps."""
    decay: float = 1.0
    """1 - lr * weight_decay."""
    size: float = 0.0
    """lr / (1 - beta1^t)."""
    root: float = 1.0
    """1 / sqrt(1 - beta2^t)."""
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    sqrt_beta2: float = 0.0
    fading: float = 0.0
    """beta1 / sqrt(beta2), the factor on an idle row's updates from step to step."""
    weight: float = 0.0
    """size / root, the numerator of an idle step."""
    offset: float = 0.0
    """eps / root, added to the square root of v in an idle step."""

    def add(
        self,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Take one more step.

        Args:
            lr: step size.
            betas: decay of the mean gradient and of the mean squared gradient.
            eps: number added to the root of the latter.
            weight_decay: fraction of lr by which rows shrink in this step.

        Raises:
            ConfigError: a value is invalid; the schedule has not changed.
        """
        lr, eps, weight_decay = float(lr), float(eps), float(weight_decay)
        beta1, beta2 = float(betas[0]), float(betas[1])
        _check(lr, (beta1, beta2), eps, weight_decay, self.idle)
        self.step += 1
        rooted = math.sqrt(1 - beta2**self.step)
        self.decay = 1 - lr * weight_decay
        self.size = lr / (1 - beta1**self.step)
        self.root = 1 / rooted
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.sqrt_beta2 = math.sqrt(beta2)
        self.fading = beta1 / self.sqrt_beta2 if beta2 else 0.0
        self.weight = self.size * rooted
        self.offset = eps * rooted


def _check(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, idle: bool
) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"`{name}` of this step is {value}, expected a finite number that is "
                "not negative: no row has moved in it"
            )
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ConfigError(
                f"`betas[{index}]` of this step is {beta}, expected a number in [0, 1)"
            )
    if lr * weight_decay >= 1:
        raise ConfigError(
            f"lr * weight_decay is {lr:g} * {weight_decay:g} = {lr * weight_decay:g}, "
            "expected less than 1: one step would shrink rows to nothing or turn "
            "their signs. Lower `lr` or `weight_decay`"
        )
    if not idle:
        return
    if betas[0] ** 2 >= betas[1]:
        raise ConfigError(
            f"`betas` of this step are {betas}, expected betas[0]**2 < betas[1]: what "
            "a row does in steps without a gradient would grow instead of fade. "
            f"Lower betas[0] below {math.sqrt(betas[1]):.4g}, or set "
            '`SparseConfig.update="lazy"`, in which such rows stand still'
        )
    if eps < SMALLEST_EPS:
        raise ConfigError(
            f"`eps` of this step is {eps:g}, expected at least {SMALLEST_EPS:g}: "
            "gradients of rows that are close to the smallest float32 count as 0"
        )
