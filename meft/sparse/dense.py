"""The plain twin: all rows, one device, ordinary autograd. The reference of the tests.

It computes scores of all neurons, a mask of those that the method keeps, and one
product with all values. The module also contains `DenseAdapter`, the same adapter with
every neuron kept, which the method is compared with (the paper's Parallel Adapter, with
its ReLU).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meft.sparse import router
from meft.sparse.config import SparseConfig


def dense(
    tokens: Float[Tensor, "tokens hidden"],
    rows: Float[Tensor, "neurons width"],
    router_weight: Float[Tensor, "experts hidden"] | None,
    config: SparseConfig,
) -> Float[Tensor, "tokens hidden"]:
    """Return the output of a sparse adapter as a function of rows and router.

    Args:
        tokens: the inputs, `tokens hidden`.
        rows: keys and values next to each other, `neurons width`.
        router_weight: W_g, `experts hidden`; None without experts.
        config: how neurons are chosen and summed.

    Returns:
        The output, `tokens hidden`.
    """
    keys, values = rows.chunk(2, 1)
    score = tokens @ keys.T
    allowed = torch.ones_like(score, dtype=torch.bool)
    if router_weight is not None:
        logits = tokens @ router_weight.T
        experts = router.top(logits.detach(), config.top_k_experts)
        per_expert = config.num_neurons // config.experts
        allowed = _mask(experts, logits).repeat_interleave(per_expert, 1)
        if config.is_gated:
            gates = logits.softmax(1) if config.gate == "softmax" else logits
            score = score * gates.repeat_interleave(per_expert, 1)
    k = min(config.top_k_neurons, config.num_candidates)
    best = router.top(score.detach().masked_fill(~allowed, -torch.inf), k)
    kept = _mask(best, score)
    if config.semantics == "union":
        kept = kept.any(0).expand_as(kept)
    return torch.relu(score * kept) @ values


def _mask(
    chosen: Tensor, like: Float[Tensor, "tokens choices"]
) -> Bool[Tensor, "tokens choices"]:
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, chosen, True)


class DenseAdapter(nn.Module):
    """An adapter whose `num_neurons` neurons are all active for every token.

        adapter(h) = relu(h W_A) W_B                     (Hao et al., equation 1)

    Args:
        hidden_size: width of the backbone.
        num_neurons: columns of W_A and rows of W_B.
    """

    def __init__(self, hidden_size: int, num_neurons: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(num_neurons, hidden_size) * router.KEY_STD)
        self.values = nn.Parameter(torch.zeros(num_neurons, hidden_size))

    def forward(
        self, hidden: Float[Tensor, "*shape hidden"]
    ) -> Float[Tensor, "*shape hidden"]:
        """Return the adapter's output, in the dtype of `hidden`."""
        score = torch.relu(hidden.to(self.keys.dtype) @ self.keys.T)
        return (score @ self.values).to(hidden.dtype)
