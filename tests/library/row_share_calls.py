"""What two processes with divided rows may call, and what each is told if it may not.

    python -m library.row_share_calls RANK FOLDER

Each leaves `RANK.pt` in FOLDER: by the name of a function below, what it returns.
"""

import copy
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import gloo_group
import meft
from library.sparse import batches, sparse_model
from meft.sparse.adapter import sparse_adapters

WORLD_SIZE = 2


def divided(group: Any = None, seconds: int = 60, **fields: Any) -> Any:
    model: Any = sparse_model(depth=2, **fields)
    meft.divide_rows(model, group, timedelta(seconds=seconds))
    return model.train()


def refusal(call: Callable[[], object]) -> str:
    """The message of the error that a call raises."""
    try:
        call()
    except meft.UnsupportedCallError as error:
        return str(error)
    return "nothing was refused"


def steps(model: Any, optimizer: Any, first: int, count: int) -> None:
    rank = distributed.get_rank()
    for step in range(first, first + count):
        model(**next(batches(1, seed=2 * step + rank))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model: Any) -> meft.SparseAdamW:
    return meft.SparseAdamW(
        [p for n, p in model.named_parameters() if n.endswith(".neurons")], lr=1e-2
    )


def saved_runs(rank: int, folder: Path) -> dict[str, Any]:
    """Rows after a run, and after runs that were saved half-way and loaded again, with
    all rows in each process or with shares of another number of processes.
    """
    model = divided()
    optimizer = adam(model)
    steps(model, optimizer, 0, 3)
    with meft.gathered_rows(model, optimizer_state=True):
        if rank == 0:
            meft.save_adapters(model, folder / "adapters")
            torch.save(model.state_dict(), folder / "model.pt")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    share = optimizer.state_dict()
    distributed.barrier()
    steps(model, optimizer, 3, 2)
    alone = [distributed.new_group([each]) for each in range(WORLD_SIZE)][rank]
    found: dict[str, Any] = {"went on": rows_of(model)}
    for name in ("shares", "all rows", "adapters", "one share"):
        other: Any = sparse_model(depth=2)
        if name == "all rows":
            meft.average_row_gradients(other)
        else:
            meft.divide_rows(other, alone if name == "one share" else None)
        if name == "adapters":
            meft.load_adapters(other, folder / "adapters")
        else:
            other.load_state_dict(torch.load(folder / "model.pt"))
        its = adam(other.train())
        its.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=False))
        if name == "one share":
            found["share of another"] = refusal_of_share(its, share)
            loaded = rows_of(other, alone)
            found["one share"] = loaded
            continue
        steps(other, its, 3, 2)
        found[name] = rows_of(other)
    found["half-way"] = torch.stack(
        [t for n, t in torch.load(folder / "model.pt").items() if n.endswith("neurons")]
    )
    return found


def refusal_of_share(optimizer: Any, state: dict[str, Any]) -> str:
    try:
        optimizer.load_state_dict(state)
    except meft.ConfigError as error:
        return str(error)
    return "nothing was refused"


def rows_of(model: Any, group: Any = None) -> torch.Tensor:
    """All rows, in every process."""
    with meft.gathered_rows(model):
        state = model.state_dict()
        rows = torch.stack([t for n, t in state.items() if n.endswith("neurons")])
    if group is None:
        rows = torch.empty_like(rows, device="cpu") if rows.is_meta else rows.clone()
        distributed.broadcast(rows, 0)
    return rows


def refused_reads(rank: int, folder: Path) -> dict[str, str]:
    """What is said of rows that were not gathered, or not here."""
    model = divided()
    found = {
        "state_dict": refusal(model.state_dict),
        "save_adapters": refusal(lambda: meft.save_adapters(model, folder / "no")),
        "save_pretrained": refusal(lambda: model.save_pretrained(folder / "no")),
        "deepcopy": refusal(lambda: copy.deepcopy(model)),
        "pickle": refusal(lambda: pickle.dumps(model)),
        "again": refusal(lambda: meft.divide_rows(model)),
        "average": refusal(lambda: meft.average_row_gradients(model)),
    }
    with meft.gathered_rows(model):
        if rank:
            found["not in this process"] = refusal(
                lambda: meft.save_adapters(model, folder / "no")
            )
    assert not (folder / "no").exists()
    meft.remove_adapters(model)
    assert model(**next(batches(1))).loss.isfinite()  # by each process alone
    return found


def gradients(rank: int, folder: Path) -> dict[str, Any]:
    """The gradient of a process, and numbers of that of all."""
    model = divided()
    (model(**next(batches(1, seed=rank))).loss).backward()
    parameter = next(iter(sparse_adapters(model).values())).neurons
    grad: Any = parameter.grad
    return {
        "shape": tuple(parameter.shape),
        "dense": grad.to_dense(),
        "norms": [torch.linalg.vector_norm(grad, p) for p in (0, 1, 2, torch.inf)],
        "norm of a copy": (2 * grad).norm(),
        "sum": grad.sum(),
    }


def overflow(rank: int, folder: Path) -> dict[str, Any]:
    """The scale of the loss after a gradient overflows in rows of one process."""
    model = divided(num_experts=4, top_k_experts=1)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(**next(batches(1, seed=rank))).loss).backward()
    if rank == 0:
        parameter: Any = optimizer.param_groups[0]["params"][0]
        parameter.grad.mul_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    return {"scale": scaler.get_scale()}


def other_calls(rank: int, folder: Path) -> dict[str, str]:
    """What is said where one process evaluates and the other has stopped to."""
    model = divided()
    model(**next(batches(1))).loss.backward()
    parameter = next(iter(sparse_adapters(model).values())).neurons
    grad: Any = parameter.grad
    call = grad.norm if rank else lambda: model(**next(batches(1)))
    return {"both": refusal(call)}


def other_adapters(rank: int, folder: Path) -> dict[str, str]:
    """What is said of models with other adapters."""
    try:
        divided(num_neurons=64 if rank else 96)
    except meft.UnsupportedModelError as error:
        return {"both": str(error)}
    return {"both": "nothing was refused"}


def other_settings(rank: int, folder: Path) -> dict[str, str]:
    """What is said of models with another update of idle rows."""
    try:
        divided(update="lazy" if rank else "catchup")
    except meft.UnsupportedModelError as error:
        return {"both": str(error)}
    return {"both": "nothing was refused"}


def one_waits(rank: int, folder: Path) -> dict[str, str]:
    """What the first process is told while the second does something else."""
    model = divided(seconds=2)
    distributed.barrier()
    if rank:
        time.sleep(6)
        return {"message": ""}
    return {"message": refusal(lambda: model(**next(batches(1))))}


CALLS = (
    saved_runs,
    refused_reads,
    gradients,
    overflow,
    other_calls,
    other_adapters,
    other_settings,
    one_waits,
)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with gloo_group.member(rank, WORLD_SIZE, folder):
        found = {call.__name__: call(rank, folder) for call in CALLS}
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
