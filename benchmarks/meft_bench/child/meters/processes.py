"""Which other processes use the GPU, so that its meters and times are not our own.

A process is our own if it is in the session of this one: a cell leads a session, which
all processes that it starts belong to. Cells that share a GPU are foreign to each
other.

In a container, NVML may know processes by ids of the host, or not at all. Then this
process is not in the list, although it uses the GPU. What was listed before it used the
GPU is foreign for certain; whether the others are is unknown.
"""

import os
from collections.abc import Callable

from meft_bench.shared.nvml import NvmlGpu, Reading

UNKNOWN_IDS = (
    "NVML does not list this process, as in a container with process ids of its own: "
    "start the container with `--pid=host`"
)


def in_session(pid: int) -> bool:
    """Return whether a process is in the session of this one."""
    try:
        return os.getsid(pid) == os.getsid(0)
    except OSError:  # it has ended, or belongs to another container
        return False


class ForeignProcesses:
    """Counts compute processes of others on a GPU, over several looks.

    Args:
        gpu: the GPU.
        uses_gpu: whether this process uses the GPU already, so that what NVML lists now
            may be this process under another id.
        is_own: returns whether a process id is our own.
    """

    def __init__(
        self, gpu: NvmlGpu, uses_gpu: bool, is_own: Callable[[int], bool] = in_session
    ) -> None:
        self._gpu = gpu
        self._is_own = is_own
        self._before = set() if uses_gpu else set(gpu.processes().value or {})
        self._most: int | None = None
        self._reason = ""

    def look(self) -> None:
        """Count the foreign processes that are on the GPU now."""
        reading = self._gpu.processes()
        if reading.value is None:
            self._reason = reading.reason
            return
        foreign = {pid for pid in reading.value if not self._is_own(pid)}
        if len(foreign) == len(reading.value):
            foreign &= self._before
            self._reason = UNKNOWN_IDS
        self._most = max(self._most or 0, len(foreign))

    @property
    def most(self) -> Reading[int]:
        """The largest number at one look. None if there may have been others."""
        if self._reason and not self._most:
            return Reading(None, self._reason)
        if self._most is None:
            return Reading(None, "no step was taken")
        return Reading(self._most)


def process_bytes(gpu: NvmlGpu, pid: int | None = None) -> Reading[int]:
    """Return the device memory that NVML attributes to a process, in bytes.

    Args:
        gpu: the GPU.
        pid: id of the process; None for this process.
    """
    reading = gpu.processes()
    if reading.value is None:
        return Reading(None, reading.reason)
    its = os.getpid() if pid is None else pid
    if its not in reading.value:
        return Reading(None, UNKNOWN_IDS)
    used = reading.value[its]
    return (
        Reading(used) if used else Reading(None, "NVML lists the process without bytes")
    )


def context_bytes(gpu: NvmlGpu, reserved_bytes: int) -> Reading[int]:
    """Return the device memory of this process that torch's allocator does not have.

    It is that of the CUDA context and of loaded kernels.

    Args:
        gpu: the GPU.
        reserved_bytes: number of bytes that the allocator has reserved.
    """
    used = process_bytes(gpu)
    if used.value is not None and used.value < reserved_bytes:
        return Reading(None, "NVML attributes less to the process than torch reserved")
    return used.then(lambda its: its - reserved_bytes)
