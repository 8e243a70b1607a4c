"""Sparse adapters that several processes train together.

Each process trains on batches of its own, as under `DistributedDataParallel`, which
leaves rows out.

    average_row_gradients    each process has all rows and takes the step of all; their
                             gradient is averaged after each backward pass
                             (`meft.sparse.row_mean`)
    divide_rows              each process has a share of the rows and takes the step of
                             these; rows and gradients are sent between processes
                             (`meft.sparse.divided_rows`)

Both give the same bits. Clipping and the optimizer know nothing of it.
"""

import contextlib
import json
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from meft.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from meft.sparse import division as dividing
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.divided_rows import DividedRows, divide
from meft.sparse.division import Division
from meft.sparse.row_parameter import row_parameter
from meft.sparse.row_shares import gather
from meft.sparse.store import RowStore, in_folder


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

    Each process has all rows; `meft.divide_rows` divides them.

    Args:
        model: the model with sparse adapters.
        process_group: the processes that train the model; None for all. They exchange
            gradients of rows in a group of their own, by gloo.

    Raises:
        UnsupportedModelError: the model has no sparse adapters.
        UnsupportedCallError: its rows are divided, or there is no process group.
    """
    adapters = _adapters(model, "meft.average_row_gradients")
    members, group = _new_group(process_group)
    for adapter in adapters:
        parameter: Any = adapter.neurons
        with torch.no_grad():
            parameter.copy_(_rows_of_first(adapter, members, group))
        parameter.process_group = group


def divide_rows(
    model: nn.Module,
    process_group: Any = None,
    timeout: timedelta = timedelta(minutes=30),
) -> None:
    """Divide the rows of sparse adapters among processes, from now on.

    Call it in every process, after `meft.add_sparse_adapters` and before the optimizer
    is created. The rows of all processes become those of the first one, of which each
    of R processes keeps every R-th: 1/R of the bytes of rows and optimizer state. It
    asks the others for the rows that its batches use, sends them their gradients, and
    takes the optimizer step of its own rows. The result has the bits of
    `meft.average_row_gradients`.

        meft.add_sparse_adapters(model, config)
        meft.divide_rows(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-3)

    With FSDP2, rows are none of the parameters that are sharded:

        rows = {p for name, p in model.named_parameters() if name.endswith(".neurons")}
        for block in model.model.layers:
            fully_shard(block, ignored_params=rows)
        fully_shard(model, ignored_params=rows)

    Processes exchange rows in every forward and backward pass, so all of them run the
    same number of these, also in evaluation; a batch may be empty or have any number of
    tokens. `parameter` and `parameter.grad` have the rows of this process; norms, sums
    and checks for infinite values are those of all. To save the model or the state of
    the optimizer, see `meft.gathered_rows`; both can be loaded by any number of
    processes.

    Args:
        model: the model with sparse adapters, whose config has `placement="offloaded"`
            and a router (`num_experts` is not 0). `prefetch` has no effect.
        process_group: the processes that train the model; None for all. They exchange
            rows in a group of their own, by gloo.
        timeout: how long a process waits for the others before it raises an error.

    Raises:
        UnsupportedModelError: the model has no sparse adapters, or they are not the
            same in all processes.
        ConfigError: the config of the adapters has another placement, `cache="home"` or
            no router.
        UnsupportedCallError: rows are divided or averaged already, or belong to an
            optimizer; there is no process group; or another process does not call it
            within `timeout`.
    """
    adapters = _adapters(model, "meft.divide_rows")
    _refuse_undividable(adapters)
    members, group = _new_group(process_group, timeout)
    divisions = [
        Division(group, block, len(adapter.rows.store), timeout)
        for block, adapter in enumerate(adapters)
    ]
    _refuse_others(adapters, divisions[0])
    stores = []
    for adapter, division in zip(adapters, divisions, strict=True):
        whole = _rows_of_first(adapter, members, group)
        stores.append(_share(adapter.rows.store, division.share(whole)))
    divided = divide(stores, divisions, adapters[0].config)
    for adapter, rows in zip(adapters, divided, strict=True):
        adapter.rows = rows
        adapter.neurons = row_parameter(rows, adapter.neurons.requires_grad)


@contextlib.contextmanager
def gathered_rows(model: nn.Module, *, optimizer_state: bool = False) -> Iterator[None]:
    """Gather divided rows in the first process, where the body can save all of them.

    All processes enter it. In the body, `state_dict()`, `save_pretrained` and
    `meft.save_adapters` of the first process have the rows of all, as they were on
    entering; the others have rows without values. Nothing is gathered if rows are not
    divided, so that a script runs in one process as in several.

        with meft.gathered_rows(model):
            if torch.distributed.get_rank() == 0:
                meft.save_adapters(model, "adapters")

    Args:
        model: the model.
        optimizer_state: whether `state_dict()` of its `meft.SparseAdamW` has the state
            of all rows, too. It is three times as large as the rows.

    Yields:
        Nothing.

    Raises:
        UnsupportedCallError: another process does not enter it.
    """
    every = [adapter.rows for adapter in sparse_adapters(model).values()]
    divided = [rows for rows in every if isinstance(rows, DividedRows)]
    try:
        for rows in divided:
            rows.gathered = gather(rows, optimizer_state=optimizer_state)
        yield
    finally:
        for rows in divided:
            rows.gathered = None


def _adapters(model: nn.Module, call: str) -> list[SparseAdapter]:
    adapters = list(sparse_adapters(model).values())
    if not adapters:
        raise UnsupportedModelError(
            "this model has no sparse adapters: call `meft.add_sparse_adapters()` "
            f"before `{call}()`"
        )
    if any(isinstance(adapter.rows, DividedRows) for adapter in adapters):
        raise UnsupportedCallError(
            f"the rows of this model are divided among processes already: call `{call}"
            "()` for a model that has all of them"
        )
    return adapters


def _refuse_undividable(adapters: list[SparseAdapter]) -> None:
    config = adapters[0].config
    if config.placement != "offloaded":
        raise ConfigError(
            f"`placement` is {config.placement!r}, but rows that are divided are sent "
            "by the host: set `SparseConfig(placement='offloaded')`, or call "
            "`meft.average_row_gradients()`, by which each process keeps all rows"
        )
    if config.cache == "home":
        raise ConfigError(
            "`cache` is 'home', but rows that are divided take their steps in the host "
            "memory of the process that has them: set `SparseConfig(cache='steps')`, "
            "or call `meft.average_row_gradients()`"
        )
    if not config.experts:
        raise ConfigError(
            "`num_experts` is 0, so that every token is compared with all neurons, of "
            "which each process would have a share: set `num_experts` for a router, or "
            "call `meft.average_row_gradients()`, by which each process keeps all rows"
        )
    for adapter in adapters:
        if getattr(adapter.neurons, "process_group", None) is not None:
            raise UnsupportedCallError(
                "the gradients of this model's rows are averaged already: call either "
                "`meft.average_row_gradients()` or `meft.divide_rows()`"
            )
        if adapter.rows.owner is not None or adapter.neurons.grad is not None:
            raise UnsupportedCallError(
                "the rows of this model belong to an optimizer or have a gradient "
                "already: call `meft.divide_rows()` before the optimizer is created, "
                "and load its state afterwards"
            )


def _new_group(
    process_group: Any, timeout: timedelta | None = None
) -> tuple[list[int], Any]:
    """Return the numbers of some processes, and a new group of them, by gloo."""
    if not distributed.is_initialized():
        raise UnsupportedCallError(
            "this process has not joined any others: start them by `torchrun` and call "
            "`torch.distributed.init_process_group()` first, as "
            "`TrainingArguments(...).device` and `accelerate.Accelerator()` do. One "
            "process alone needs neither `meft.divide_rows()` nor "
            "`meft.average_row_gradients()`"
        )
    members = distributed.get_process_group_ranks(process_group)
    group = distributed.new_group(
        members, timeout, "gloo", use_local_synchronization=True
    )
    return members, group


def _refuse_others(adapters: list[SparseAdapter], division: Division) -> None:
    """Raise an error if the adapters of other processes are not like these."""
    store, config = adapters[0].rows.store, adapters[0].config
    settings = json.dumps([config.function(), config.update], sort_keys=True)
    mine = {
        "blocks": len(adapters),
        "rows in each block": len(store),
        "numbers in each row": store.width,
        "bytes for each number that is sent": store.transfer_dtype.itemsize,
        "other settings": zlib.crc32(settings.encode()),
    }
    gathered = division.gather(torch.tensor([*mine.values()]), dividing.SHAPES)
    for rank, found in enumerate(gathered.tolist()):
        for (name, one), other in zip(mine.items(), found, strict=True):
            if one != other:
                differs = f"has {one} {name}, but process {rank} has {other}"
                if name == "other settings":
                    differs = f"and process {rank} have adapters with {name}"
                raise UnsupportedModelError(
                    f"this process {differs}: add the same adapters in all processes, "
                    f"as with {config!r}"
                )


def _rows_of_first(adapter: SparseAdapter, members: list[int], group: Any) -> Tensor:
    """Return the rows of a block as the first process has them."""
    first = adapter.rows.store.settled().cpu().clone()
    distributed.broadcast(first, src=members[0], group=group)
    return first


def _share(store: RowStore, rows: Tensor) -> RowStore:
    """Return a store like `store` of some of its rows, without optimizer state."""
    options = store.transfer_dtype, store.update
    if store.folder is not None:
        return in_folder(rows, *options, store.folder)
    return RowStore(rows.clone(), *options)
