"""Sparse adapters that two processes train, in a module that each of them runs.

    python -m library.row_ranks RANK FOLDER

Each leaves `RANK.pt` in FOLDER: by kind, what `train` returns.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gloo_group
import meft
from library.sparse import batches, sparse_model

WORLD_SIZE = 2
NUM_STEPS = 3
KINDS: dict[str, dict[str, Any]] = {
    "offloaded": {},
    "resident": {"placement": "resident"},
    "no experts": {"num_experts": 0},
    "dense": {"update": "dense"},
    "lazy, no cache": {"update": "lazy", "cache": "off"},
    "window": {"cache": "window"},
    "16 bits": {"transfer_dtype": "bfloat16", "placement": "resident"},
    "reversible": {},
    "rows only": {"num_experts": 0},
    "accumulated": {},
}


def made(kind: str) -> Any:
    """The model of a kind, ready for training by one process."""
    model = sparse_model(depth=2, **KINDS[kind])
    if kind == "reversible":
        config = meft.ReversibleConfig(adapter=None, on_mismatch="raise")
        meft.make_reversible(model, config)
    if kind != "rows only":
        model.model.norm.weight.requires_grad = True
    return model.train()


def train(kind: str, rank: int | None) -> dict[str, Any]:
    """The rows' gradients of the first step, and all weights after a few.

    Args:
        kind: one of `KINDS`.
        rank: number of this process, which trains on its half of the batches; None for
            one that trains alone, on all of them.
    """
    model = made(kind)
    called = model
    if rank is not None:
        if rank:  # rows, and other parameters, become those of the first process
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
        meft.average_row_gradients(model)
        if kind == "rows only":  # of which DDP takes none
            model.load_state_dict(made(kind).state_dict())
        else:
            called = nn.parallel.DistributedDataParallel(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = meft.SparseAdamW(trained.values(), lr=1e-2, weight_decay=0.01)
    per_rank = 2 if kind == "accumulated" else 1
    every = list(batches(NUM_STEPS * WORLD_SIZE * per_rank, seq=12))
    first: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        of_step = [every.pop(0) for _ in range(WORLD_SIZE * per_rank)]
        mine = of_step if rank is None else of_step[rank::WORLD_SIZE]
        for index, batch in enumerate(mine):
            is_last = index + 1 == len(mine)
            waits = called is not model and not is_last
            with called.no_sync() if waits else contextlib.nullcontext():
                (called(**batch).loss / len(mine)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
        if step == 0:
            first = {n: dense(p.grad) for n, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in trained.items()}
    return {"gradients": first, "weights": weights}


def dense(gradient: Any) -> Tensor:
    found: Tensor = gradient.to_dense().clone()
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with gloo_group.member(rank, WORLD_SIZE, folder):
        found = {kind: train(kind, rank) for kind in KINDS}
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
