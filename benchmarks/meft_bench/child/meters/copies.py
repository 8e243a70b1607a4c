"""Bytes that a step copies between host and GPU, as torch's profiler sees them.

The profiler (CUPTI) has an event for each copy, whose name says its direction and the
kind of host memory, and whose arguments say its bytes:

    {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)",
     "args": {"bytes": 1024, ...}}

It sees the copies of all code of the process: also those of the batch, and those that
the ledger of a method does not know. It does not see what kernels read from host memory
themselves, nor pages of managed memory that the driver moves.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft_bench.shared.nvml import Reading

_OF_THE_GPU = ("gpu_memcpy", "gpu_memset", "kernel")
_NO_EVENTS = (
    "torch's profiler saw no work of the GPU: CUPTI is missing, or another profiler "
    "uses it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Bytes of the copies of one step."""

    profiled_h2d_bytes: int
    """From host to device."""
    profiled_d2h_bytes: int
    """From device to host."""
    profiled_pageable_bytes: int
    """Those of both directions whose end on the host is not page-locked."""


def profiled_copies(step: Callable[[], object]) -> Reading[Copies]:
    """Take a step, and return what it copied.

    Args:
        step: function that takes the step on the current CUDA device.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace")
        profile.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    return copies_in(trace["traceEvents"])


def copies_in(events: Iterable[dict[str, Any]]) -> Reading[Copies]:
    """Return the bytes of the copies in a trace.

    Args:
        events: the `traceEvents` of a trace in Chrome's format.
    """
    own = [event for event in events if event.get("cat") in _OF_THE_GPU]
    if not own:
        return Reading(None, _NO_EVENTS)
    copies = [event for event in own if event["cat"] == "gpu_memcpy"]
    return Reading(
        Copies(
            profiled_h2d_bytes=_bytes(copies, "HtoD"),
            profiled_d2h_bytes=_bytes(copies, "DtoH"),
            profiled_pageable_bytes=_bytes(
                [event for event in copies if "Pageable" in event["name"]],
                *("HtoD", "DtoH"),
            ),
        )
    )


def _bytes(copies: Iterable[dict[str, Any]], *directions: str) -> int:
    names = tuple(f"Memcpy {direction}" for direction in directions)
    its = (event for event in copies if event["name"].startswith(names))
    return sum(int(event["args"]["bytes"]) for event in its)
