"""A small model that FSDP2 shards, on tensors with values and without.

Its widths cannot be divided evenly among ranks, so that shards are padded.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import gloo_group
from meft_bench.virtual.emulation import storages
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Trace

WIDTH, HIDDEN, ROWS, NUM_BLOCKS = 60, 100, 32, 4
NUM_TRIES = 4


class Block(nn.Module):
    """A feed-forward with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states."""
        out: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Blocks between two projections that belong to the root."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        x = self.first(x)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        out: Tensor = self.last(x)
        return out


def sharded(device: str, num_ranks: int, checkpoints: bool, **options: Any) -> Any:
    """A model whose blocks and root are sharded.

    Args:
        device: type of the device.
        num_ranks: number of ranks of the process group, which exists.
        checkpoints: whether each block is recomputed.
        options: those of `fully_shard`.
    """
    mesh = init_device_mesh(device, (num_ranks,))
    model = Model(checkpoints=checkpoints).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
    """Run one step of training."""
    optimizer.zero_grad()
    model(torch.ones(ROWS, WIDTH, device=device)).square().sum().backward()
    optimizer.step()


def second_step(
    device: str, num_ranks: int, ledger: Ledger, checkpoints: bool, **options: Any
) -> dict[str, int]:
    """The peak of the second step by kind, in bytes; `total` is their sum."""
    model = sharded(device, num_ranks, checkpoints, **options)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ledger.watch(model, optimizer)
    step(model, optimizer, device)
    start = ledger.mark()
    step(model, optimizer, device)
    return peak_of(ledger.trace(), device, start)


def peak_of(trace: Trace, device: str, start: int) -> dict[str, int]:
    """The bytes at the peak by kind, without what is on the host next to a GPU."""
    trace = dataclasses.replace(trace, round_bytes=1)

    def kind(storage: Any) -> str:
        # Integers are the ranks of a mesh.
        is_of_host = storage.shape == () or storage.dtype.startswith("int")
        return "host" if is_of_host else trace.kind_of(storage)

    most: dict[str, int] = {"total": 0}
    for time, _, _, by_kind in trace.held(device, kind):
        kept = Counter(by_kind)
        del kept["host"], kept["libraries"]
        if time >= start and kept.total() > most["total"]:
            most = {k: v for k, v in kept.items() if v} | {"total": kept.total()}
    return most


@contextlib.contextmanager
def group_of(num_ranks: int) -> Iterator[None]:
    """A process group of ranks that do not exist, for tensors with values."""
    distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=num_ranks
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def recorded() -> Iterator[Ledger]:
    """A ledger of the CPU."""
    ledger = Ledger(accelerator="cpu", round_bytes=1)
    with contextlib.ExitStack() as stack:
        # FSDP2 frees parameters by resizing their storages, which is no operator.
        for patch in storages.of(SimpleNamespace(ledger=ledger)):
            stack.enter_context(patch)
        yield stack.enter_context(ledger)


def with_values(num_ranks: int, checkpoints: bool, **options: Any) -> dict[str, int]:
    """The peak on the CPU, in the process group that exists."""
    with recorded() as ledger:
        return second_step("cpu", num_ranks, ledger, checkpoints, **options)


def tracked(num_ranks: int, checkpoints: bool) -> int:
    """The peak of a second step, in bytes, by PyTorch's own tracker of FSDP2."""
    model = sharded("cpu", num_ranks, checkpoints)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    step(model, optimizer, "cpu")
    optimizer.zero_grad()
    tracker = FSDPMemTracker(model, optimizer)
    with tracker:
        step(model, optimizer, "cpu")
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(snapshot["Total"])


def in_each_process(rank: int, num_ranks: int, folder: str, checkpoints: bool) -> None:
    """Write the peaks of one of several processes that exist.

    Threads of gloo may hold a tensor a moment longer, which only adds: the least of
    some peaks is the one without that.
    """
    with gloo_group.member(rank, num_ranks, folder):
        peaks = [with_values(num_ranks, checkpoints) for _ in range(NUM_TRIES)]
        totals = [tracked(num_ranks, checkpoints) for _ in range(NUM_TRIES)]
        ledger = min(peaks, key=lambda kinds: kinds["total"])
        found = {"ledger": ledger, "tracker": {"total": min(totals)}}
        torch.save(found, Path(folder) / f"peaks-{rank}.pt")
