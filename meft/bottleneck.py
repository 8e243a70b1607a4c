"""The adapter that both methods share: down, activation, dropout, up.

    bottleneck(x) = W_up dropout(activation(W_down x + b_down)) + b_up

It contains no skip connection and no norm; the caller adds its output to another
tensor. Both weights are initialised from N(0, std^2) and both biases as 0, so the
output is initially small but not 0 (Liao et al., NeurIPS 2023, figure 4: std = 0.02).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Adapter of the form down, activation, dropout, up.

    Args:
        hidden_size: width of the backbone.
        bottleneck_size: inner width, at least 1.
        activation: elementwise function, the backbone's own.
        dropout: probability between activation and up, the backbone's own.
        std: initial standard deviation of both weights.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Float[Tensor, "*shape hidden"]
    ) -> Float[Tensor, "*shape hidden"]:
        """Return the adapter's output, in the dtype of `x`.

        Adapters keep float32 weights next to a half-precision backbone, hence the
        casts.
        """
        inner = self.activation(self.down(x.to(self.down.weight.dtype)))
        outer: Tensor = self.up(self.dropout(inner))
        return outer.to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of parameters added to a backbone: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
