"""Product-key memories next to the feed-forward (Lample et al., NeurIPS 2019).

    q = norm(W_q x),   s_ij = k_i q_1 + k'_j q_2,   out = sum_heads softmax(top s) V

Of `num_neurons` values V, each has a pair of keys out of two lists of its square root:
the best `top_k_neurons` of all sums are among the sums of the best of each list. The
queries of a head are normalised as in later memory layers (Berges et al., 2024), where
the first paper has a batch norm. All values are on the device, with a dense gradient;
sparse adapters keep theirs in host memory and move those that a batch activates.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from meft.backbone.family import AdapterShape
from meft_bench.child.methods.adapters import at
from meft_bench.shared.cell import Cell

NUM_HEADS = 4
"""Number of queries of a token, the authors'."""


def pkm(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train a memory next to each feed-forward, and the new head.

    Raises:
        ValueError: `num_neurons` is no square.
    """
    root = math.isqrt(cell.num_neurons)
    if root**2 != cell.num_neurons:
        raise ValueError(
            f"method {cell.method!r} with `num_neurons` = {cell.num_neurons}, which is "
            f"no square: take {root**2} or {(root + 1) ** 2}"
        )
    return at(["mlp_adapter"], model, cell, _memory)


def _memory(shape: AdapterShape, cell: Cell) -> nn.Module:
    root = math.isqrt(cell.num_neurons)
    return ProductKeyMemory(shape.hidden_size, root, cell.top_k_neurons, shape.std)


class ProductKeyMemory(nn.Module):
    """A memory whose keys are pairs.

    Args:
        hidden_size: width of the input and of values.
        num_keys: length of each list of keys; there are as many values as pairs.
        top_k: number of values that a head reads.
        std: initial standard deviation of values.
    """

    def __init__(self, hidden_size: int, num_keys: int, top_k: int, std: float) -> None:
        super().__init__()
        half = max(1, hidden_size // 4)
        self.query = nn.Linear(hidden_size, NUM_HEADS * 2 * half, bias=False)
        keys = torch.randn(NUM_HEADS, 2, num_keys, half) / math.sqrt(half)
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(torch.randn(num_keys**2, hidden_size) * std)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        """Return what the memory reads, of the shape and dtype of `x`."""
        tokens = x.reshape(-1, x.shape[-1]).to(self.values.dtype)
        weights, chosen = self.read(tokens)
        found = functional.embedding_bag(
            chosen, self.values, per_sample_weights=weights, mode="sum"
        )
        return found.reshape(x.shape).to(x.dtype)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers of values, `tokens (heads * top_k)`.

        Args:
            tokens: `tokens hidden`.
        """
        num_heads, _, num_keys, half = self.keys.shape
        queries = self.query(tokens).unflatten(-1, (num_heads, 2, half))
        queries = functional.layer_norm(queries, (half,))
        scores = torch.einsum("thpd,hpnd->thpn", queries, self.keys.to(queries.dtype))
        best, places = scores.topk(min(self.top_k, num_keys), dim=-1)
        sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]
        pairs = places[:, :, 0, :, None] * num_keys + places[:, :, 1, None, :]
        sums, pairs = sums.flatten(-2), pairs.flatten(-2)
        top, position = sums.topk(min(self.top_k, sums.shape[-1]), dim=-1)
        weights = top.softmax(-1).to(self.values.dtype)
        return weights.flatten(1), pairs.gather(-1, position).flatten(1)
