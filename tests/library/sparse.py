"""Tiny LLaMA models with sparse adapters, and what tests ask of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import meft
from meft.sparse.adapter import SharedState, SparseAdapter, sparse_adapters
from meft.sparse.engine import Engine
from meft.sparse.offloaded_rows import OffloadedRows, offload
from meft.sparse.router import make_router
from meft.sparse.rows import ResidentRows
from meft.sparse.store import RowStore

HIDDEN, DEPTH, VOCAB = 16, 3, 50
ROUTINGS: dict[str, dict[str, Any]] = {
    "experts": {},
    "no experts": {"num_experts": 0},
    "softmax": {"gate": "softmax"},
    "ungated": {"gate": "none"},
    "union": {"semantics": "union"},
    "union, no experts": {"semantics": "union", "num_experts": 0},
}
"""Every way to choose and to answer."""
IN_MODELS = ROUTINGS | {
    "look-ahead": {"lookahead": 1},
    "look-ahead by two, ungated": {"lookahead": 2, "gate": "none"},
}
"""These, and the ways that take earlier blocks."""


def config(**fields: Any) -> meft.SparseConfig:
    """64 neurons in 32 experts; of these 4, and of their neurons 6, are kept."""
    small = {"num_neurons": 64, "top_k_neurons": 6, "top_k_experts": 4}
    return meft.SparseConfig(**small | fields)


def plain_model(depth: int = DEPTH, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**options | fields))
    model.train()
    return model


def sparse_model(
    depth: int = DEPTH, save_backbone: bool = False, **fields: Any
) -> LlamaForCausalLM:
    """With rows that are not at their start, each block's its own."""
    model = plain_model(depth)
    torch.manual_seed(1)
    meft.add_sparse_adapters(model, config(**fields), save_backbone=save_backbone)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for adapter in sparse_adapters(model).values():
        store = adapter.rows.store
        store.replace(0.3 * torch.randn(store.rows.shape, generator=generator))


def lone_adapter(cfg: meft.SparseConfig, hidden: int = HIDDEN) -> SparseAdapter:
    """An adapter in no model."""
    generator = torch.Generator().manual_seed(5)
    rows = 0.3 * torch.randn(cfg.num_neurons, 2 * hidden, generator=generator)
    store = RowStore(rows, getattr(torch, cfg.transfer_dtype or "float32"), cfg.update)
    weight = make_router(rows[:, :hidden], cfg.experts) if cfg.experts else None
    if weight is not None:
        weight.requires_grad = cfg.router_learns
    home = (
        ResidentRows(store)
        if cfg.placement == "resident"
        else offload([store], cfg).blocks[0]
    )
    return SparseAdapter(home, weight, cfg, SharedState())


def batches(
    count: int, rows: int = 2, seq: int = 9, seed: int = 6
) -> Iterator[dict[str, Tensor]]:
    """Texts of which the last is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (rows, seq), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, :3] = 0
        ids = ids.masked_fill(mask == 0, 0)
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Single rows for `Trainer`."""

    def __init__(self) -> None:
        self.rows = [
            {name: tensor[i] for name, tensor in inputs.items()}
            for inputs in batches(8)
            for i in range(2)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def train(
    model: PreTrainedModel,
    steps: int = 4,
    window: int = 2,
    clip: float | None = 0.5,
) -> list[float]:
    """The losses of a short training run, in windows of `window` batches."""
    adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
    losses = []
    data = batches(steps * window)
    for _ in range(steps):
        for _ in range(window):
            loss = model(**next(data)).loss
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        adam.zero_grad()
    return losses


def all_rows(model: PreTrainedModel) -> Tensor:
    """Every block's rows as they are now."""
    adapters = sparse_adapters(model).values()
    return torch.cat([adapter.rows.store.settled() for adapter in adapters])


def row_gradients(model: PreTrainedModel) -> Tensor:
    """Every block's gradient, 0 where there is none."""
    found = []
    for adapter in sparse_adapters(model).values():
        ids, gradient = adapter.rows.gradient()()
        whole = torch.zeros_like(adapter.rows.store.rows)
        whole[ids] = gradient
        found.append(whole)
    return torch.cat(found)


def engine_of(model: PreTrainedModel) -> Engine:
    """The one that all blocks share."""
    rows = next(iter(sparse_adapters(model).values())).rows
    assert isinstance(rows, OffloadedRows)
    return rows.engine
