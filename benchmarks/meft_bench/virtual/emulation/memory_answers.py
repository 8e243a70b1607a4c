"""Answers of torch's memory functions, from the memory that a ledger records.

`memory_stats`, `memory_summary` and `memory_snapshot` are answered as well, by
`torch.cuda` and by `torch.accelerator`; what is not modelled is refused.
"""

import contextlib
import importlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol
from unittest import mock

import torch

from meft_bench.virtual.device.gpu import Gpu
from meft_bench.virtual.recording.live_memory import LiveMemory
from meft_bench.virtual.recording.replay import Replay

NOT_MODELLED = (
    *("change_current_allocator", "use_mem_pool", "set_per_process_memory_fraction"),
    *("get_per_process_memory_fraction", "_record_memory_history", "_dump_snapshot"),
    "_snapshot",
    *("caching_allocator_alloc", "caching_allocator_delete"),
)
"""Functions of `torch.cuda.memory` that have no answer."""


class HasMemory(Protocol):
    """A device with a memory."""

    gpu: Gpu

    @property
    def memory(self) -> LiveMemory:
        """The memory so far; raises an error where nothing is recorded."""

    def reset_peaks(self) -> None:
        """Count peaks from now on."""

    def peaks(self) -> Replay:
        """Return the peaks; raises an error where they are larger than the memory."""


def of(device: HasMemory) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of `torch.cuda` and `torch.accelerator`.

    Args:
        device: the device that answers.
    """

    def reset_peaks(*_: Any, **__: Any) -> None:
        device.reset_peaks()

    def reset_sums(*_: Any, **__: Any) -> None:
        device.memory.allocator.reset_sums()

    def empty_cache(*_: Any, **__: Any) -> None:
        device.memory.allocator.empty_cache()

    def nested(*_: Any, **__: Any) -> dict[str, Any]:
        device.peaks()
        return device.memory.allocator.statistics()

    def info(*_: Any, **__: Any) -> tuple[int, int]:
        taken = device.gpu.context_bytes + device.peaks().end_reserved_bytes
        return max(device.gpu.memory_bytes - taken, 0), device.gpu.memory_bytes

    def used(*_: Any, **__: Any) -> int:
        free, total = info()
        return total - free

    def segments(*_: Any, **__: Any) -> list[dict[str, Any]]:
        return device.memory.allocator.segments()

    answers: dict[str, Any] = {
        "reset_peak_memory_stats": reset_peaks,
        "reset_accumulated_memory_stats": reset_sums,
        "empty_cache": empty_cache,
        "max_memory_allocated": lambda *_, **__: device.peaks().allocated_bytes,
        "max_memory_reserved": lambda *_, **__: device.peaks().reserved_bytes,
        "memory_allocated": lambda *_, **__: device.peaks().end_allocated_bytes,
        "memory_reserved": lambda *_, **__: device.peaks().end_reserved_bytes,
        "memory_stats": lambda *_, **__: flattened(nested()),
    }
    of_cuda = {
        "memory_stats_as_nested_dict": nested,
        "mem_get_info": info,
        "memory_snapshot": segments,
        "device_memory_used": used,
        "get_allocator_backend": lambda: "native",
        **{name: _refusal(name) for name in NOT_MODELLED},
    }
    # Some code takes the functions from the module in which they are written.
    for module in (torch.cuda, importlib.import_module("torch.cuda.memory")):
        yield from _replaced(module, answers | of_cuda)
    for module in (
        torch.accelerator,
        importlib.import_module("torch.accelerator.memory"),
    ):
        yield from _replaced(module, answers | {"get_memory_info": info})


def flattened(nested: dict[str, Any]) -> "OrderedDict[str, Any]":
    """Return statistics with names such as `allocated_bytes.all.peak`."""
    found: list[tuple[str, Any]] = []

    def add(prefix: str, value: Any) -> None:
        if not isinstance(value, dict):
            found.append((prefix, value))
            return
        for name, inner in value.items():
            add(f"{prefix}.{name}" if prefix else name, inner)

    add("", nested)
    return OrderedDict(sorted(found))


def _refusal(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(
            f"`torch.cuda.memory.{name}` is not modelled by a virtual GPU, which "
            "answers `memory_stats`, `memory_summary` and `memory_snapshot`"
        )

    return refuse


def _replaced(
    module: Any, answers: dict[str, Any]
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    for name, answer in answers.items():
        if hasattr(module, name):
            yield mock.patch.object(module, name, answer)
