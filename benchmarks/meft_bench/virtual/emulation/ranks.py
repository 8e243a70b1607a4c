"""Rank 0 of several ranks that train together, in one process.

    with one_of(8, backend, ledger):
        mesh = init_device_mesh("cuda", (8,))
        fully_shard(model, mesh=mesh)

`torch.distributed` has a process group of that many ranks, of which one exists: torch's
`fake` backend, whose collectives send nothing and return at once. FSDP2's own code runs
in it, so that shards, buffers of collectives and the order in which they are freed are
its own. Shards of rank 0 are never smaller than those of another: where the rows of a
parameter cannot be divided evenly, the last ranks have fewer.

The operators of FSDP2 choose streams as on a GPU (`cuda_streams`).
DistributedDataParallel runs as well (`replicas`).
"""

import contextlib
import importlib
import operator
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch._subclasses import fake_impls

from meft_bench.virtual.emulation import replicas
from meft_bench.virtual.emulation.backend import Backend
from meft_bench.virtual.emulation.early_imports import everywhere
from meft_bench.virtual.recording.ledger import Ledger

NOT_COUNTED = "not modelled: what NCCL allocates for its connections and channels"


def in_words(num_ranks: int) -> str:
    """Return what a plan of one of several ranks assumes."""
    return (
        f"assumed: rank 0 of {num_ranks}, whose shards are largest (plans of several "
        f"ranks have not been compared with GPUs); {NOT_COUNTED}"
    )


@contextlib.contextmanager
def one_of(num_ranks: int, backend: Backend, ledger: Ledger) -> Iterator[None]:
    """Let code run as rank 0 of `num_ranks`, as `torchrun` would have started it.

    Args:
        num_ranks: number of ranks; 1 has no effect.
        backend: the backend of the virtual GPU.
        ledger: what records the code.

    Raises:
        NotImplementedError: the backend has no streams.
    """
    if num_ranks == 1:
        yield
        return
    if backend.device != "cuda":
        raise NotImplementedError(
            f"`ranks={num_ranks}` is not modelled with {backend.how}, where FSDP2 uses "
            "no streams: leave it out to plan the step of one process"
        )
    # Registers the `fake` backend, and optimizers' lists of distributed tensors.
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    importlib.import_module("torch.distributed.tensor")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, _variables(num_ranks)))
        plain = distributed.init_process_group
        for patch in everywhere(plain, "init_process_group", _group_of(num_ranks)):
            stack.enter_context(patch)
        for patch in (*_moving_to_shards(), *replicas.alone(), _waiting()):
            stack.enter_context(patch)
        stack.enter_context(_shapes_without_memory(ledger))
        try:
            yield
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _variables(num_ranks: int) -> dict[str, str]:
    """Return the variables of the environment that `torchrun` sets for rank 0."""
    found = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}
    found |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    found |= {"MASTER_PORT": 29500}
    return {n: str(v) for n, v in found.items()} | {"MASTER_ADDR": "localhost"}


_plain_init: Any = distributed.init_process_group


def _group_of(num_ranks: int) -> Any:
    """Return a function that makes a group whose other ranks do not exist.

    Args:
        num_ranks: number of ranks of the group.
    """

    def init_process_group(
        backend: Any = None,
        init_method: Any = None,
        timeout: Any = None,
        world_size: int = -1,
        rank: int = -1,
        **_: Any,
    ) -> None:
        if world_size not in (-1, num_ranks):
            raise ValueError(
                f"`world_size` is {world_size}, and `virtual_gpu` has "
                f"`ranks={num_ranks}`: give the same number to both"
            )
        if rank not in (-1, 0):
            raise ValueError(
                f"`rank` is {rank}: a virtual GPU is that of rank 0, which takes most; "
                "leave `rank` out, or read it from the variable `RANK`"
            )
        store = distributed.HashStore()  # type: ignore[attr-defined]
        _plain_init("fake", store=store, rank=0, world_size=num_ranks)

    return init_process_group


def _moving_to_shards() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Let FSDP2 move parameters of the host: a new `data` moves no fake tensor."""
    plain = _part_of_torch(
        "torch.distributed.fsdp._fully_shard._fsdp_init", "_move_states_to_device"
    )

    def move(params: list[Any], buffers: list[Any], device: torch.device) -> None:
        for tensor in [*params, *buffers]:
            if tensor.device == device or tensor.is_meta:
                continue
            moved = tensor.detach().to(device)
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, moved)

    yield from everywhere(plain, "_move_states_to_device", move)


def _waiting() -> contextlib.AbstractContextManager[Any]:
    """Let a wait for a collective return its tensor, of which fake ones make a copy."""

    def wait(mode: Any, func: Any, tensor: Any) -> Any:
        return tensor

    waits = torch.ops._c10d_functional.wait_tensor.default
    return mock.patch.dict(fake_impls.op_implementations_dict, {waits: wait})


def _shapes_without_memory(ledger: Ledger) -> contextlib.AbstractContextManager[Any]:
    """Leave operators that only derive shapes of distributed tensors out of the ledger.

    They would be counted with the sizes of whole tensors.
    """
    module = "torch.distributed.tensor._sharding_prop"
    propagator = _part_of_torch(module, "ShardingPropagator")
    name = "_propagate_tensor_meta_non_cached"
    plain = _part_of_torch(module, f"ShardingPropagator.{name}")

    def propagated(self: Any, schema: Any) -> Any:
        with ledger.paused():
            return plain(self, schema)

    return mock.patch.object(propagator, name, propagated)


def _part_of_torch(module: str, name: str) -> Any:
    """Return a class or function of torch that is not public.

    Raises:
        NotImplementedError: this version of torch has it elsewhere, or not at all.
    """
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"`ranks` is not modelled with torch {torch.__version__}, which has no "
            f"`{module}.{name}`: use torch 2.13, or leave `ranks` out"
        ) from error
