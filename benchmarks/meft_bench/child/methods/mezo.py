"""MeZO: fine-tuning with forward passes only (Malladi et al., NeurIPS 2023).

    g = (L(w + e z) - L(w - e z)) / 2 e,   w <- w - lr g z,   z ~ N(0, 1)

z is made again from its seed whenever it is needed, so that a step takes the memory of
inference: weights and nothing that is saved for a backward. Both losses are computed
without dropout, as in the authors' code.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meft_bench.child.methods.full import full
from meft_bench.shared.cell import Cell

EPSILON = 1e-3
"""e, by which weights move along z."""


def mezo(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train all parameters, from differences of losses.

    Raises:
        ValueError: weights are narrower than float32.
    """
    if cell.weights_dtype != "fp32":
        raise ValueError(
            f"method {cell.method!r} with `weights_dtype` = {cell.weights_dtype!r}: "
            "weights move along a direction and back, which rounds them away in so few "
            "bits: take 'fp32'"
        )
    return full(model, cell)


def mezo_optimizer(
    model: PreTrainedModel, groups: list[dict[str, Any]], cell: Cell
) -> torch.optim.Optimizer:
    """Return the optimizer, which computes losses itself."""
    return Mezo(groups, model, cell.seed)


class Mezo(torch.optim.Optimizer):
    """Steps along random directions, by the difference of two losses.

    Args:
        groups: parameters with their decay.
        model: the model, which is in evaluation mode while losses are computed.
        seed: of the directions.
    """

    needs_gradients = False
    """Whether a backward precedes a step."""

    def __init__(
        self, groups: list[dict[str, Any]], model: PreTrainedModel, seed: int
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._model = model
        self._random = random.Random(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: returns the loss of the current weights.

        Returns:
            The mean of both losses.
        """
        seed = self._random.randrange(2**31)
        was_training = self._model.training
        self._model.eval()
        self._move(seed, EPSILON)
        above = closure()
        self._move(seed, -2 * EPSILON)
        below = closure()
        self._move(seed, EPSILON)
        self._model.train(was_training)
        slope = (above - below) / (2 * EPSILON)
        for group, parameter, direction in self._directions(seed):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction, alpha=group["lr"] * slope)
        return (above + below) / 2

    def _move(self, seed: int, distance: float) -> None:
        for _, parameter, direction in self._directions(seed):
            parameter.add_(direction, alpha=distance)

    def _directions(self, seed: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if generator is None:
                    generator = torch.Generator(parameter.device).manual_seed(seed)
                direction = torch.empty_like(parameter).normal_(generator=generator)
                yield group, parameter, direction
