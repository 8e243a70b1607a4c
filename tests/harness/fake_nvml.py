"""NVML on a machine with one GPU, as its documentation says that it behaves.

Constants and errors are those of the real module `pynvml`; a function that is not
written here does not exist. What a driver does not offer raises the error that NVML
returns for it. Counters of 32 bits wrap.
"""

import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

UUID = "GPU-1234"
DRIVER = "580.159.04"


@dataclass
class FakeNvml:
    """NVML with one device."""

    uuid: str = UUID
    errors: dict[str, int] = field(default_factory=dict)
    """By the name of a function: the error that it raises, such as
    `pynvml.NVML_ERROR_NOT_SUPPORTED`."""
    field_errors: dict[int, int] = field(default_factory=dict)
    """By the id of a field: the error in its `nvmlReturn`."""
    processes: dict[int, int | None] = field(default_factory=dict)
    """Device memory of compute processes, by their ids."""
    used_bytes: int = 648_347_648
    sent: Iterator[int] = field(default_factory=lambda: iter(range(0, 10**9, 100)))
    """What the counter of sent bytes would be if it did not wrap, one a reading."""
    received: Iterator[int] = field(default_factory=lambda: iter(range(0, 10**9, 300)))
    is_32_bit: bool = True
    kilobytes_per_second: tuple[int, int] = (2_000, 5_000)
    """Sent, received."""
    window_seconds: float = 0.02
    """Time for which a query of a rate blocks."""
    link: tuple[int, int, int, int] = (4, 1, 5, 1)
    """Generation, width, and the highest of both: so slow that a counter of 32 bits
    wraps within a second, not within the time of a thread switch."""
    millijoules: Iterator[int] = field(default_factory=lambda: iter(range(5, 10**9, 7)))
    """What the counter of energy shows, one a reading."""
    clocks: dict[int, int] = field(
        default_factory=lambda: {
            pynvml.NVML_CLOCK_SM: 1980,
            pynvml.NVML_CLOCK_MEM: 3201,
        }
    )
    event_reasons: int = 0
    num_open: int = 0

    def __getattr__(self, name: str) -> Any:
        # Constants and errors; python calls this for what is not written here.
        if name.startswith("nvml") and callable(getattr(pynvml, name, None)):
            raise AttributeError(f"the fake has no {name}")
        return getattr(pynvml, name)

    def _check(self) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        name = frame.f_back.f_code.co_name
        if name in self.errors:
            raise pynvml.NVMLError(self.errors[name])
        if not self.num_open and name != "nvmlInit":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._check()
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self._check()
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._check()
        return DRIVER

    def nvmlDeviceGetCount(self) -> int:
        self._check()
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._check()
        return "device"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._check()
        if uuid != self.uuid:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "device"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        self._check()
        return self.uuid

    def nvmlDeviceGetName(self, handle: str) -> str:
        self._check()
        return "NVIDIA H200"

    def nvmlDeviceGetComputeRunningProcesses(
        self, handle: str
    ) -> list[SimpleNamespace]:
        self._check()
        its = self.processes.items()
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in its]

    def nvmlDeviceGetMemoryInfo(
        self, handle: str, version: int | None = None
    ) -> SimpleNamespace:
        self._check()
        return SimpleNamespace(used=self.used_bytes, free=2**30)

    def nvmlDeviceGetFieldValues(
        self, handle: str, fieldIds: list[int]
    ) -> list[SimpleNamespace]:
        self._check()
        return [self._field(number) for number in fieldIds]

    def _field(self, number: int) -> SimpleNamespace:
        if number in self.field_errors:
            return SimpleNamespace(nvmlReturn=self.field_errors[number])
        readings = {
            pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES: self.sent,
            pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES: self.received,
        }
        value = next(readings[number])
        if self.is_32_bit:
            kind = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
        else:
            kind = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
        return SimpleNamespace(
            nvmlReturn=pynvml.NVML_SUCCESS,
            valueType=kind,
            value=SimpleNamespace(uiVal=value % 2**32, ullVal=value),
        )

    def nvmlDeviceGetPcieThroughput(self, device: str, counter: int) -> int:
        self._check()
        time.sleep(self.window_seconds)
        return self.kilobytes_per_second[counter]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: str) -> int:
        self._check()
        return self.link[0]

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        self._check()
        return self.link[1]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        self._check()
        return self.link[2]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> int:
        self._check()
        return self.link[3]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._check()
        return next(self.millijoules)

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:
        self._check()
        return self.clocks[type]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._check()
        return self.event_reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._check()
        return self.event_reasons


QUERIES = tuple(
    name for name in vars(FakeNvml) if name.startswith(("nvmlDevice", "nvmlSystem"))
)
"""Functions that ask something, each of which a driver may lack."""


def last(*values: int) -> Iterator[int]:
    """Yield values, and the last one for ever."""
    yield from values
    while True:
        yield values[-1]
