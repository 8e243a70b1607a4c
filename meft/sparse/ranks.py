"""Sparse adapters that several processes train together, each with all rows.

Each process trains on batches of its own, as under `DistributedDataParallel`, which
leaves rows out. Their gradient is averaged at the end of each backward pass
(`meft.sparse.row_mean`), so that clipping and the optimizer have the same gradient in
every process, and rows and their optimizer state stay equal in every bit. Rows are not
divided among processes: each takes the step of all rows.
"""

from typing import Any

import torch
from torch import distributed, nn

from meft.errors import UnsupportedModelError
from meft.sparse.adapter import sparse_adapters


def average_row_gradients(model: nn.Module, process_group: Any = None) -> None:
    """Average the gradients of the rows of sparse adapters over processes, from now on.

    Call it in every process, after `meft.add_sparse_adapters` and before the first
    forward pass. The rows of all processes become those of the first one. Each backward
    pass then leaves in `parameter.grad` the mean over processes, as
    `DistributedDataParallel` does for all other parameters. All processes run the same
    number of backward passes. Gradients that are accumulated over several backward
    passes are averaged in each of them, also under `no_sync()`. With
    `semantics="union"`, each process chooses neurons for its own batch.

        meft.add_sparse_adapters(model, config)
        meft.average_row_gradients(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model)

    Args:
        model: the model with sparse adapters.
        process_group: the processes that train the model; None for all. They exchange
            gradients of rows in a group of their own, by gloo.

    Raises:
        UnsupportedModelError: the model has no sparse adapters.
    """
    adapters = sparse_adapters(model)
    if not adapters:
        raise UnsupportedModelError(
            "this model has no sparse adapters: call `meft.add_sparse_adapters()` "
            "before `meft.average_row_gradients()`"
        )
    members = distributed.get_process_group_ranks(process_group)
    group = distributed.new_group(
        members, backend="gloo", use_local_synchronization=True
    )
    for adapter in adapters.values():
        parameter: Any = adapter.neurons
        first = adapter.rows.store.settled().cpu().clone()
        distributed.broadcast(first, src=members[0], group=group)
        with torch.no_grad():
            parameter.copy_(first)
        parameter.process_group = group
