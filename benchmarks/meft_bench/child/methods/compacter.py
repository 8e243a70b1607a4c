"""Compacter: adapters of hypercomplex layers (Karimi Mahabadi et al., NeurIPS 2021).

    y = W x + b,   W = sum_i A_i (x) s_i t_i^T,   i = 1 ... n,   (x) Kronecker's product

A_i are `n n` and shared by all adapters of a model, s_i and t_i are vectors of a layer.
The adapters are where Houlsby's are (`adapters`), and the numbers are the authors'.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from meft.backbone.family import AdapterShape
from meft_bench.child.methods.adapters import at
from meft_bench.shared.cell import Cell

NUM_RULES = 4
"""n: the number of products, which divides the sizes of a layer."""
RULE_STD = 1e-4
"""Initial standard deviation of the matrices A."""


def compacter(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train two hypercomplex adapters per block, and the new head.

    Raises:
        ValueError: the sizes of the layers are no multiples of `NUM_RULES`.
    """
    rules = nn.Parameter(torch.randn(NUM_RULES, NUM_RULES, NUM_RULES) * RULE_STD)
    places = ["attention_adapter", "output_adapter"]
    return at(places, model, cell, partial(_adapter, rules=rules))


def _adapter(shape: AdapterShape, cell: Cell, rules: nn.Parameter) -> nn.Module:
    inner = cell.bottleneck_size
    for name, size in (("bottleneck_size", inner), ("hidden_size", shape.hidden_size)):
        if size % NUM_RULES:
            raise ValueError(
                f"method {cell.method!r} with `{name}` = {size}, which is no multiple "
                f"of the {NUM_RULES} products of its layers: take a multiple, or "
                "'houlsby'"
            )
    return CompactAdapter(shape, inner, rules)


class CompactAdapter(nn.Module):
    """Adapter of the form down, activation, dropout, up, of two hypercomplex layers.

    Args:
        shape: what it takes from its backbone.
        bottleneck_size: inner width.
        rules: the matrices A, `n n n`.
    """

    def __init__(
        self, shape: AdapterShape, bottleneck_size: int, rules: nn.Parameter
    ) -> None:
        super().__init__()
        self.down = HypercomplexLinear(shape.hidden_size, bottleneck_size, rules)
        self.activation = shape.activation
        self.dropout = nn.Dropout(shape.dropout)
        self.up = HypercomplexLinear(bottleneck_size, shape.hidden_size, rules)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapter's output, of the shape and dtype of `x`."""
        inner = self.activation(self.down(x.to(self.down.bias.dtype)))
        outer: Tensor = self.up(self.dropout(inner))
        return outer.to(x.dtype)


class HypercomplexLinear(nn.Module):
    """A linear layer whose weight is a sum of Kronecker products.

    Args:
        num_inputs: size of the last axis of the input.
        num_outputs: size of the last axis of the output.
        rules: the matrices A, `n n n`, shared with other layers.
    """

    def __init__(self, num_inputs: int, num_outputs: int, rules: nn.Parameter) -> None:
        super().__init__()
        number = len(rules)
        self.rules = rules
        self.left = nn.Parameter(torch.empty(number, num_outputs // number, 1))
        self.right = nn.Parameter(torch.empty(number, 1, num_inputs // number))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        for factor in (self.left, self.right):
            nn.init.xavier_uniform_(factor)

    def weight(self) -> Tensor:
        """Return W, `outputs inputs`."""
        products = self.left @ self.right
        pairs = zip(self.rules, products, strict=True)
        return torch.stack([torch.kron(rule, one) for rule, one in pairs]).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return `W x + b`, `... outputs`."""
        return functional.linear(x, self.weight(), self.bias)
