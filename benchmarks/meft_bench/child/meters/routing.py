"""How a batch uses the neurons of its adapters, measured outside the method.

    recall      share of the neurons that a token would keep if all were scored which
                it also keeps with its experts and router; mean over tokens
    curve       each neuron's activation relu(k . h), the mean over tokens; neurons by
                size, as shares of the largest, at 64 evenly spaced positions
                (figure 2 of Hao et al., ACL 2024)

Both score every neuron, which the method itself never does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meft.sparse import router
from meft.sparse.adapter import SparseAdapter
from meft.sparse.dense import DenseAdapter

NUM_POINTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Fields of `Measurement`."""

    routing_recall: list[float] | None
    """Recall per block, lowest first; None where nothing is routed."""
    activation_curve: list[float] | None
    """Mean curve over blocks; None where no neuron was active."""


@torch.no_grad()
def look(model: nn.Module, run: Callable[[], object]) -> Routing | None:
    """Measure `run()`, one forward of `model`.

    Returns:
        The measurement; None without such adapters, or if no process has all keys.
    """
    adapters = [
        m for m in model.modules() if isinstance(m, SparseAdapter | DenseAdapter)
    ]
    if not adapters or any(getattr(a, "is_divided", False) for a in adapters):
        return None
    recalls: list[float] = []
    curves: list[Tensor] = []

    def note(adapter: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0]
        padding, tokens = kwargs.get("padding"), hidden.flatten(0, -2).float()
        if padding is not None:
            tokens = tokens[padding.places(hidden)]
        keys = _keys(adapter).to(tokens.device)
        scores = tokens @ keys.T
        if isinstance(adapter, SparseAdapter) and adapter.router is not None:
            recalls.append(_recall(adapter, tokens, scores))
        curves.append(torch.relu(scores).mean(0).sort(descending=True).values.cpu())

    hooks = [a.register_forward_pre_hook(note, with_kwargs=True) for a in adapters]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return Routing(
        routing_recall=recalls or None, activation_curve=_curve(torch.stack(curves))
    )


def _keys(adapter: nn.Module) -> Tensor:
    if isinstance(adapter, DenseAdapter):
        return adapter.keys.detach().float()
    assert isinstance(adapter, SparseAdapter)
    return adapter.rows.store.keys().float()


def _recall(adapter: SparseAdapter, tokens: Tensor, scores: Tensor) -> float:
    config = adapter.config
    assert adapter.router is not None
    logits = functional.linear(tokens, adapter.router.float())
    experts = router.top(logits, config.top_k_experts)
    held = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, experts, True)
    held = held.repeat_interleave(adapter.config.neurons_per_expert, 1)
    routed = scores
    if config.is_gated:
        gates = logits.softmax(1) if config.gate == "softmax" else logits
        routed = scores * gates.repeat_interleave(adapter.config.neurons_per_expert, 1)
    k = min(config.top_k_neurons, config.num_candidates)
    kept = router.top(routed.masked_fill(~held, -torch.inf), k)
    best = router.top(scores, config.top_k_neurons)
    is_best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    found = is_best.gather(1, kept).sum(1) / config.top_k_neurons
    return float(found.mean())


def _curve(sorted_means: Tensor) -> list[float] | None:
    mean = sorted_means.mean(0)
    if mean[0] <= 0:
        return None
    places = torch.linspace(0, len(mean) - 1, NUM_POINTS).round().long()
    found: list[float] = (mean[places] / mean[0]).tolist()
    return found
