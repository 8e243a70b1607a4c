"""The parameters of a model that trains, and whether they have moved."""

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_unmoved(model: nn.Module, before: list[Tensor]) -> None:
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
