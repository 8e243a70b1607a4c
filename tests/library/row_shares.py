"""Processes that train sparse adapters with all rows each, and with a share each.

    python -m library.row_shares RANK SIZE FOLDER KIND ...

Each leaves `RANK.pt` in FOLDER: by kind, what `train` returns with all rows and with a
share.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gloo_group
import meft
from library.sparse import batches, sparse_model
from meft.sparse.adapter import sparse_adapters

NUM_STEPS = 4
KINDS: dict[str, dict[str, Any]] = {
    "catchup": {},
    "lazy": {"update": "lazy"},
    "dense": {"update": "dense", "semantics": "union"},
    "16 bits": {"transfer_dtype": "bfloat16"},
    "16 bits, no cache": {"transfer_dtype": "bfloat16", "cache": "off"},
    "window": {"cache": "window", "update": "lazy"},
    "in pieces": {"device_bytes": 6000},
    "small cache": {"device_bytes": 20000, "update": "lazy"},
    "accumulated": {},
    "accumulated, 16 bits": {"transfer_dtype": "bfloat16"},
    "reversible": {},
    "checkpointed": {},
    "in files": {},
    "fsdp2": {},
    "fsdp2, reversible": {},
}
QUICK = ("catchup", "accumulated, 16 bits")
"""Kinds that stand for the others."""


def made(kind: str, folder: Path | str = "") -> Any:
    """The model of a kind, ready for training by one process."""
    files: dict[str, Any] = {"folder": str(folder)} if kind == "in files" else {}
    model: Any = sparse_model(depth=2, **KINDS[kind], **files)
    if "reversible" in kind:
        config = meft.ReversibleConfig(adapter=None, on_mismatch="raise")
        meft.make_reversible(model, config)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    model.model.norm.weight.requires_grad = True
    return model.train()


def batches_of(rank: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of a process, of sizes of their own; one has no token but padding."""
    sizes = [(1 + rank % 2, 7 + (rank * index) % 3) for index in range(count)]
    found = [
        next(batches(1, rows, seq, seed=index))
        for index, (rows, seq) in enumerate(sizes)
    ]
    if rank == 1:
        found[1]["attention_mask"] = torch.zeros_like(found[1]["attention_mask"])
    return found


def parallel(model: Any, kind: str) -> Any:
    """What a process calls: a module of DDP, or the model, sharded but for its rows."""
    if not kind.startswith("fsdp2"):
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    rows = {p for name, p in model.named_parameters() if name.endswith(".neurons")}
    if kind == "fsdp2":  # a reversible stack with sparse adapters calls no blocks
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, ignored_params=rows)
    return fully_shard(model, mesh=mesh, ignored_params=rows)


def whole(tensor: Any) -> Tensor:
    """A copy of a tensor, gathered if FSDP2 has sharded it."""
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copied: Tensor = found.detach().clone()
    return copied


def train(kind: str, divides: bool, folder: Path) -> dict[str, Any]:
    """The losses, rows and optimizer state of a run, of the first process all rows."""
    rank = distributed.get_rank()
    model = made(kind, folder)
    if rank:  # rows, and other parameters, become those of the first process
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    (meft.divide_rows if divides else meft.average_row_gradients)(model)
    called = parallel(model, kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = meft.SparseAdamW(trained, lr=1e-2, weight_decay=0.01)
    per_step = 3 if kind.startswith("accumulated") else 1
    every = batches_of(rank, NUM_STEPS * per_step)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        for index in range(per_step):
            is_last = index + 1 == per_step
            waits = not is_last and called is not model
            with called.no_sync() if waits else contextlib.nullcontext():
                loss = called(**every[step * per_step + index]).loss
                (loss / per_step).backward()
            losses.append(loss.item())
        norms.append(whole(torch.nn.utils.clip_grad_norm_(trained, 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses.append(called(**every[0]).loss.item())
    stores = [adapter.rows.store for adapter in sparse_adapters(model).values()]
    with meft.gathered_rows(model, optimizer_state=True):
        state = model.state_dict().items()
        return {
            "losses": losses,
            "norms": norms,
            "weights": {n: whole(t) for n, t in state if torch.is_tensor(t)},
            "optimizer": [] if divides and rank else optimizer.state_dict()["rows"],
            "bytes": sum(store.nbytes for store in stores),
        }


def both(kind: str, folder: Path) -> dict[bool, dict[str, Any]]:
    """What `train` returns, by whether rows are divided.

    The first run of a process does not count: MKL multiplies the first small matrices
    in other bits than equal ones later on.
    """
    train(kind, False, folder)
    return {divides: train(kind, divides, folder) for divides in (False, True)}


def main(rank: int, size: int, folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    with gloo_group.member(rank, size, folder):
        found = {kind: both(kind, folder) for kind in kinds}
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
