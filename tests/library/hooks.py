"""Models and hooks for tests of hooks on parameters."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from library.models import batch, only_stack, reversible

Change = Callable[[Tensor], Tensor | None]
Inputs = dict[str, Tensor]
BATCH = batch()


def whole(variant: str = "meft1", **options: Any) -> Any:
    """A reversible model all of whose parameters train, with dropout."""
    model = reversible(3, dropout=0.1, variant=variant, **options)
    model.requires_grad_(True)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def store(model: Any) -> Any:
    """The same model, as its twin."""
    only_stack(model).backward_pass = "store"
    return model


class Hooks:
    """A hook on each of some parameters that notes what it was given."""

    def __init__(self, parameters: dict[str, nn.Parameter], change: Change) -> None:
        self.seen: dict[str, list[Tensor]] = {name: [] for name in parameters}
        self.handles = [
            p.register_hook(functools.partial(self._hook, name, change))
            for name, p in parameters.items()
        ]

    def _hook(self, name: str, change: Change, gradient: Tensor) -> Tensor | None:
        self.seen[name].append(gradient.clone())
        return change(gradient)

    def once(self) -> Inputs:
        """What each was given: each one gradient, or none."""
        assert all(len(seen) <= 1 for seen in self.seen.values())
        return {name: seen[0] for name, seen in self.seen.items() if seen}


def assert_same(one: Inputs, other: Inputs) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def loss_of(model: Any) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    loss: Tensor = model(**BATCH).loss
    return loss


def grads_of(model: Any) -> Inputs:
    return {
        n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None
    }
