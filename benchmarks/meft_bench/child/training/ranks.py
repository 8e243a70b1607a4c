"""The ranks of a cell: processes that train one model together, as one would alone.

A batch has the rows of all ranks, and rank r of R trains on the r-th of R equal parts:

    gradient of the batch = 1/R * sum over ranks of the gradient of R * n_r/n * loss_r

where n_r of the n target tokens of the batch (or labels, of which each rank has as
many) are in the part of rank r, and loss_r is their mean loss. The factor R * n_r/n is
in `Stepper.divisors`, and the mean over ranks is what both ways of training compute:

    ddp     each rank has the whole model, and gradients are averaged during backward
            (`DistributedDataParallel`)
    fsdp2   each rank has a part of every parameter, gradient and optimizer state; a
            block's are gathered while it runs (`fully_shard` of each block, then of the
            model)

Every rank reads all rows in the same order, and pads its part to the length of the
whole batch, so that only gradients are exchanged. Each rank draws its own dropout.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import meft
from meft.sparse.adapter import sparse_adapters
from meft.sparse.row_parameter import rows_of
from meft_bench.child.tasks.batches import Batch
from meft_bench.shared.cell import Cell

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""The process groups of each device. Numbers and objects are exchanged by the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that train one model.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, batch: Batch) -> Batch:
        """Return the rows of this rank, of a batch of all ranks."""
        if self.size == 1:
            return batch
        num_rows = len(batch["labels"]) // self.size
        begin = self.rank * num_rows
        return {name: rows[begin : begin + num_rows] for name, rows in batch.items()}

    def mean(self, number: float) -> float:
        """Return the mean of a number over all ranks, in which each has its own."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total) / self.size


ALONE = Ranks()
"""A process that trains alone."""


def of(cell: Cell) -> Ranks:
    """Return this process among the ranks of a cell, which have joined."""
    if cell.ranks == 1:
        return ALONE
    return Ranks(rank=distributed.get_rank(), size=cell.ranks)


def join(cell: Cell) -> None:
    """Join the other ranks of a cell; does nothing if there is one.

    torchrun has set the variables by which processes find each other.
    """
    if cell.ranks == 1:
        return
    if cell.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(BACKENDS[cell.device])


def parallel(
    model: Any, cell: Cell, blocks: Sequence[nn.Module]
) -> DistributedDataParallel | None:
    """Move a model to the device of this rank, as its share of the training requires.

    Args:
        model: the model, with the method applied.
        cell: the number of ranks, and how they train.
        blocks: the blocks of the model.

    Returns:
        The module whose forward a training step calls instead of the model's; None for
        the model itself.
    """
    if cell.ranks == 1:
        model.to(cell.device)
        return None
    if cell.parallel == "fsdp2":
        # Imported here: few cells need them, and all would wait for them.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(cell.device, (cell.ranks,))
        rows = {p for p in model.parameters() if rows_of(p) is not None}
        for block in {id(block): block for block in blocks}.values():
            fully_shard(block, mesh=mesh, ignored_params=rows)
        fully_shard(model, mesh=mesh, ignored_params=rows)
        return None
    model.to(cell.device)
    adapters = sparse_adapters(model).values()
    if adapters and not any(adapter.is_divided for adapter in adapters):
        meft.average_row_gradients(model)
    is_trained = (p.requires_grad and rows_of(p) is None for p in model.parameters())
    return DistributedDataParallel(model) if any(is_trained) else None


@contextlib.contextmanager
def only_in_last(
    module: DistributedDataParallel | None, is_last: bool
) -> Iterator[None]:
    """Average gradients in the backward of the last micro-batch of a step only.

    Args:
        module: what a training step calls; None for the model itself.
        is_last: whether the body runs the last micro-batch.
    """
    if module is None or is_last:
        yield
        return
    with module.no_sync():
        yield
