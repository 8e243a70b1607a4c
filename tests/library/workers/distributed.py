"""One of two processes that train under `DistributedDataParallel`; gloo, CPU.

    python distributed.py RANK FOLDER

Processes meet through a file in FOLDER, so that no port has to be free, and each
leaves `RANK.pt` there: by variant and backward pass, what `train` returns. Every rank
has rows of its own.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import gloo_group
import meft
from library.models import batch, classifier

WORLD_SIZE = 2
DEPTH = 3


def train(rank: int, variant: str, backward: str) -> dict[str, Any]:
    """Gradients of one step, of a step that accumulates, and the losses of a few."""
    torch.set_num_threads(1)
    model = classifier(DEPTH, dropout=0.1)
    torch.manual_seed(1)
    config = meft.ReversibleConfig(
        variant=variant, bottleneck_size=3, backward=backward
    )
    meft.make_reversible(model, config)
    model.train()
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = batch(rows=4, padded=False)
    mine = {name: tensor[rank::WORLD_SIZE] for name, tensor in rows.items()}
    torch.manual_seed(3 + rank)

    def gradients() -> dict[str, torch.Tensor]:
        missing = [name for name, p in trainable.items() if p.grad is None]
        assert not missing, missing
        return {n: p.grad.clone() for n, p in trainable.items() if p.grad is not None}

    seen: dict[str, Any] = {}
    parallel(**mine).loss.backward()
    seen["once"] = gradients()

    model.zero_grad()
    with parallel.no_sync():
        parallel(**mine).loss.backward()
        seen["local"] = gradients()
    parallel(**mine).loss.backward()
    seen["accumulated"] = gradients()

    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        model.zero_grad()
        loss = parallel(**mine).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    seen["losses"] = losses
    seen["trained"] = {name: p.detach().clone() for name, p in trainable.items()}
    return seen


def main(rank: int, folder: Path) -> None:
    with gloo_group.member(rank, WORLD_SIZE, folder):
        seen = {
            (variant, backward): train(rank, variant, backward)
            for variant in ("meft1", "meft2", "meft3")
            for backward in ("rebuild", "store")
        }
        torch.save(seen, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
