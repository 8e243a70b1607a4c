"""Training by one process or by several ranks, in a module that each rank imports."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gloo_group
from harness.test_accumulation import micro_batches, model_of
from harness.tiny import batch as labelled_batch
from harness.tiny import cell, classifier
from meft.sparse.row_parameter import rows_of
from meft_bench.child.tasks.batches import IGNORED, Batch
from meft_bench.child.training import prepare
from meft_bench.shared import methods
from meft_bench.shared.registry import METHODS, load

NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how."""

    method: str
    parallel: str = "ddp"
    micro_batch: int = 8
    """Rows of a micro-batch of the eight rows of a step."""
    labels: str = "tokens"
    """`tokens`, `few` (of the second half only), or `classes`."""
    optimizer: str = "adamw"
    dtype: str = "fp32"

    def batches(self) -> list[Batch]:
        """The micro-batches of a step."""
        if self.labels == "classes":
            return [labelled_batch(self.micro_batch)]
        found = micro_batches(self.micro_batch)
        if self.labels == "few":
            for one in found:
                one["labels"][: self.micro_batch // 2] = IGNORED
        return found


def train(case: Case, ranks: int = 1) -> dict[str, Any]:
    """The losses of a few steps, the gradients of the first, and the weights."""
    model: Any = classifier("llama") if case.labels == "classes" else model_of(cell())
    model.config.use_cache = False
    here = cell(
        method=case.method,
        ranks=ranks,
        parallel=case.parallel if ranks > 1 else "ddp",
        batch_size=case.micro_batch,
        num_neurons=64,
        top_k_neurons=8,
        optimizer=case.optimizer,
        dtype=case.dtype,
        **methods.TABLE[case.method].defaults,
    )
    torch.manual_seed(1)
    stepper = prepare.with_method(model, here, load(METHODS[case.method]))
    stepper.model.train()
    named = {n: p for n, p in stepper.model.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters: Any, norm: float) -> None:
        if not gradients:
            gradients.update({n: _of_all(p, p.grad) for n, p in named.items()})
        clip(parameters, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        losses = [stepper.step(case.batches(), 1e-2) for _ in range(NUM_STEPS)]
    weights = {name: _of_all(p, p.detach()) for name, p in named.items()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def _of_all(parameter: Any, tensor: Any) -> Tensor:
    """An ordinary tensor of what belongs to a parameter, of all ranks."""
    whole, rows = _whole(tensor), rows_of(parameter)
    if rows is None or rows.division is None:
        return whole
    shares: list[Any] = [None] * rows.division.size
    torch.distributed.all_gather_object(shares, whole)
    found = torch.empty(rows.division.num_rows, whole.shape[1])
    for rank, share in enumerate(shares):
        rows.division.share(found, rank).copy_(share)
    return found


def _whole(tensor: Any) -> Tensor:
    """An ordinary tensor of a shard, of the gradient of rows, or of any other."""
    for name in ("full_tensor", "to_dense"):
        tensor = getattr(tensor, name)() if hasattr(tensor, name) else tensor
    return torch.Tensor(tensor).clone()


def command(rank: int, size: int, folder: Path, cases: list[Case]) -> list[str]:
    """The command of one rank, which leaves `RANK.pt` in a folder."""
    text = json.dumps([asdict(case) for case in cases])
    return [sys.executable, "-m", __name__, str(rank), str(size), str(folder), text]


def main(rank: int, size: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    with gloo_group.member(rank, size, folder):
        found = {case: train(case, size) for case in cases}
        torch.save(
            {repr(case): one for case, one in found.items()}, folder / f"{rank}.pt"
        )


if __name__ == "__main__":
    fields = json.loads(sys.argv[4])
    every = [Case(**one) for one in fields]
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), every)
