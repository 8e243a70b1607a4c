"""How long a step takes at least, by what it computes and what it copies (a roofline).

    phase  =  max(arithmetic / rate of the GPU, memory traffic / bandwidth of the GPU,
                  bytes to the GPU / rate of the link, bytes to the host / rate,
                  memory traffic of the host / bandwidth of the host)
    step   =  sum over forward, backward and update

All rates are the vendor's. Within a phase, everything is taken to overlap, and phases
are not: weights of an update depend on all gradients, and a backward on its forward.
The link transfers in both directions at a time. The memory traffic of the host is that
of its operators, such as gathering rows, of AdamW on the host, and of copies; it takes
no time unless the bandwidth of the host is known.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meft_bench.virtual.device.gpu import Gpu
from meft_bench.virtual.recording.trace import BACKWARD

PHASES = ("forward", "backward", "update")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSeconds:
    """The least time of one phase of a step, by what takes it."""

    phase: str
    arithmetic: float
    memory: float
    """Access to the memory of the GPU."""
    to_device: float
    to_host: float
    host: float = 0.0
    """Access to the memory of the host."""

    @property
    def seconds(self) -> float:
        """Return the least time of the phase."""
        return max(
            self.arithmetic, self.memory, self.to_device, self.to_host, self.host
        )

    @property
    def bound(self) -> str:
        """Return what takes that time, in words."""
        words = {
            "arithmetic": self.arithmetic,
            "memory": self.memory,
            "the link to the GPU": self.to_device,
            "the link to the host": self.to_host,
            "the memory of the host": self.host,
        }
        return max(words, key=words.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """Return the times, their maximum and what takes it."""
        summary = {"seconds": self.seconds, "bound": self.bound}
        return dataclasses.asdict(self) | summary


def roofline(
    gpu: Gpu,
    flops_per_second: float,
    flops: Mapping[str, int],
    touched: Mapping[str, int],
    copied: Mapping[tuple[str, str], int],
    touched_by_host: Mapping[str, int] | None = None,
) -> list[PhaseSeconds]:
    """Return the least times of the phases of a step.

    Args:
        gpu: the GPU, with the rates of its memory, its link and its host.
        flops_per_second: rate of the arithmetic.
        flops: floating-point operations, by phase of the recording.
        touched: bytes that operators read and write, by phase.
        copied: bytes between host and device, by (direction, phase).
        touched_by_host: bytes of host memory that are read and written, by phase.
    """
    host_rate = gpu.host_bytes_per_second or math.inf
    return [
        PhaseSeconds(
            phase=phase,
            arithmetic=_sum(flops, phase) / flops_per_second,
            memory=_sum(touched, phase) / gpu.memory_bytes_per_second,
            to_device=_sum(_of(copied, "h2d"), phase) / gpu.link_bytes_per_second,
            to_host=_sum(_of(copied, "d2h"), phase) / gpu.link_bytes_per_second,
            host=_sum(touched_by_host or {}, phase) / host_rate,
        )
        for phase in PHASES
    ]


def _of(copied: Mapping[tuple[str, str], int], direction: str) -> dict[str, int]:
    return {phase: size for (way, phase), size in copied.items() if way == direction}


def _sum(numbers: Mapping[str, int], phase: str) -> int:
    """Return the number of a phase; work outside of all is that of a forward."""
    return sum(number for name, number in numbers.items() if _part(name) == phase)


def _part(name: str) -> str:
    if name in BACKWARD:
        return "backward"
    return "update" if name == "update" else "forward"
