"""NVML, NVIDIA's management library: a query returns a value or the reason for none.

Meters, and the command that says which of them work, use NVML through this module only.
A query that a driver, a GPU or a permission does not allow returns a `Reading` without
a value and with the reason and the remedy; it never raises, and it never returns 0 in
place of a value. The next query may still have one, so meters fail field by field.

The `nvml` argument of functions is the module `pynvml` (package `nvidia-ml-py`), which
`load` returns, or an object with the same functions. NVML knows a GPU as a whole: its
counters include the work of all processes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")

INSTALL = "python -m pip install nvidia-ml-py"
_REASONS = {
    "NVML_ERROR_NO_PERMISSION": "NVML refuses it: ask an administrator for permission, "
    "or run as root",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "driver {driver} is too old: update it",
    # What drivers return for a field, or a structure, that they do not know.
    "NVML_ERROR_INVALID_ARGUMENT": "driver {driver} does not know it: update it",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH": "driver {driver} does not know it: update "
    "it",
    "NVML_ERROR_NOT_SUPPORTED": "neither the GPU nor driver {driver} offers it: none "
    "but another GPU or driver has it",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "there is no NVML library: install NVIDIA's driver "
    "or, in a container, pass the GPU to it (docker: `--gpus all`)",
    "NVML_ERROR_DRIVER_NOT_LOADED": "NVIDIA's driver is not loaded: load or install it",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "NVML and the driver in the kernel differ in "
    "their version: restart the machine",
}
"""Reasons and remedies by the name of NVML's error."""
_UNKNOWN = "of unknown version"
_HIDDEN_BY_MIG = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_INVALID_ARGUMENT")
_MIG = "MIG hides it: a part of a GPU has no meter of its own; measure on a whole GPU"

_EVENT_REASONS = {
    "ApplicationsClocksSetting": "application clocks",
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "thermal slowdown by software",
    "HwThermalSlowdown": "thermal slowdown by hardware",
    "HwPowerBrakeSlowdown": "power brake",
    "DisplayClockSetting": "display clocks",
}
"""Words for reasons why clocks are not the highest, by the end of NVML's name.

An idle GPU is none of them: its clocks are low because there is no work.
"""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """A value, or the reason why there is none."""

    value: T | None
    reason: str = ""
    """What prevents the value, and the remedy; empty if there is one."""

    def then(self, convert: Callable[[T], S]) -> "Reading[S]":
        """Return the reading with its value converted; a reason stays."""
        if self.value is None:
            return Reading(None, self.reason)
        return Reading(convert(self.value))


@dataclass(frozen=True, slots=True)
class CounterValue:
    """One reading of a counter of bytes."""

    value: int
    num_bits: int
    """Width of the number in which NVML returns it."""


def load() -> Reading[ModuleType]:
    """Return the module `pynvml`."""
    try:
        import pynvml  # machines without the bench extra lack it
    except ImportError:
        return Reading(None, f"cannot tell without `{INSTALL}`")
    return Reading(pynvml)


def why_closed(nvml: Any) -> str:
    """Return why NVML cannot be used; empty if it can.

    Args:
        nvml: the module `pynvml`.
    """
    with open_gpu(nvml, []) as gpu:
        return gpu.reason


@contextlib.contextmanager
def open_gpu(nvml: Any, uuids: Sequence[str]) -> Iterator["Reading[NvmlGpu]"]:
    """Open NVML for the block, and provide the first of `uuids` that it knows.

    NVML numbers GPUs in another order than CUDA, so UUIDs are used.

    Args:
        nvml: the module `pynvml`.
        uuids: names of one GPU that are tried in turn, such as `GPU-...`, `MIG-...`.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield Reading(None, _reason(nvml, error, _UNKNOWN, is_part=False))
        return
    try:
        yield _found(nvml, uuids)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _found(nvml: Any, uuids: Sequence[str]) -> "Reading[NvmlGpu]":
    reading: Reading[NvmlGpu] = Reading(None)
    for uuid in uuids:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            reading = Reading(None, f"NVML does not know {uuid}: {error}")
            continue
        return Reading(NvmlGpu(nvml, handle, is_part=uuid.startswith("MIG-")))
    return reading


class NvmlGpu:
    """A GPU, or a part of one (MIG), that NVML has opened.

    Args:
        nvml: the module `pynvml`.
        handle: NVML's handle of the GPU.
        is_part: whether it is a part of a GPU.
    """

    def __init__(self, nvml: Any, handle: Any, is_part: bool = False) -> None:
        self._nvml = nvml
        self._handle = handle
        self._is_part = is_part
        try:
            self._driver = str(nvml.nvmlSystemGetDriverVersion())
        except nvml.NVMLError:
            self._driver = _UNKNOWN

    def processes(self) -> Reading[dict[int, int | None]]:
        """Return the bytes of device memory of each compute process, by process id.

        The bytes are None where NVML does not tell. Ids are those of the process
        namespace that NVML sees, which in a container may be the host's.
        """
        found: Reading[Any] = self._ask("nvmlDeviceGetComputeRunningProcesses")
        return found.then(lambda its: {one.pid: one.usedGpuMemory for one in its})

    def used_bytes(self) -> Reading[int]:
        """Return the device memory that is in use, by all processes and the driver."""
        found: Reading[Any] = self._ask("nvmlDeviceGetMemoryInfo")
        return _positive(found.then(lambda its: int(its.used)))

    def link_counters(self) -> tuple[Reading[CounterValue], Reading[CounterValue]]:
        """Return the readings of the link's counters: bytes sent, bytes received.

        They count since an unknown time, with headers, for all processes.
        """
        nvml = self._nvml
        fields = [
            nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
            nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES,
        ]
        found: Reading[Any] = self._ask("nvmlDeviceGetFieldValues", fields)
        if found.value is None:
            return Reading(None, found.reason), Reading(None, found.reason)
        sent, received = (self._reading(one) for one in found.value)
        return sent, received

    def _reading(self, field: Any) -> Reading[CounterValue]:
        nvml = self._nvml
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            return Reading(None, self._why(nvml.NVMLError(field.nvmlReturn)))
        if field.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
            return Reading(CounterValue(int(field.value.uiVal), 32))
        if field.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG:
            return Reading(CounterValue(int(field.value.ullVal), 64))
        return Reading(None, f"NVML counts in an unknown type: {field.valueType}")

    def link_rates(self) -> tuple[Reading[int], Reading[int]]:
        """Return bytes a second over the link: sent, received; blocks for about 40 ms.

        Each is the mean of a window of 20 ms of its own.
        """
        nvml, name = self._nvml, "nvmlDeviceGetPcieThroughput"
        sent: Reading[int] = self._ask(name, nvml.NVML_PCIE_UTIL_TX_BYTES)
        received: Reading[int] = self._ask(name, nvml.NVML_PCIE_UTIL_RX_BYTES)
        # NVML gives KB/s.
        return sent.then(lambda its: 1000 * its), received.then(lambda its: 1000 * its)

    def link_generation(self) -> Reading[int]:
        """Return the PCIe generation of the link now, which is low if it is idle."""
        return _positive(self._ask("nvmlDeviceGetCurrPcieLinkGeneration"))

    def link_generation_maximum(self) -> Reading[int]:
        """Return the highest PCIe generation that GPU and machine have together."""
        return _positive(self._ask("nvmlDeviceGetMaxPcieLinkGeneration"))

    def link_width(self) -> Reading[int]:
        """Return the number of lanes that the link has now."""
        return _positive(self._ask("nvmlDeviceGetCurrPcieLinkWidth"))

    def link_width_maximum(self) -> Reading[int]:
        """Return the highest number of lanes that GPU and machine have together."""
        return _positive(self._ask("nvmlDeviceGetMaxPcieLinkWidth"))

    def energy_millijoules(self) -> Reading[int]:
        """Return the energy that the GPU has used since its driver was loaded."""
        return _positive(self._ask("nvmlDeviceGetTotalEnergyConsumption"))

    def sm_clock_megahertz(self) -> Reading[int]:
        """Return the clock of the multiprocessors."""
        clock = self._nvml.NVML_CLOCK_SM
        return _positive(self._ask("nvmlDeviceGetClockInfo", clock))

    def memory_clock_megahertz(self) -> Reading[int]:
        """Return the clock of the memory."""
        clock = self._nvml.NVML_CLOCK_MEM
        return _positive(self._ask("nvmlDeviceGetClockInfo", clock))

    def throttle_reasons(self) -> Reading[frozenset[str]]:
        """Return why clocks are not the highest now, in words; empty if they are."""
        found: Reading[int] = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if found.value is None:  # drivers before 535 have the older name only
            older: Reading[int] = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
            found = found if older.value is None else older
        return found.then(self._words)

    def _words(self, bits: int) -> frozenset[str]:
        bits &= ~int(self._nvml.nvmlClocksEventReasonGpuIdle)
        words = set()
        for name, its in _EVENT_REASONS.items():
            bit = int(getattr(self._nvml, f"nvmlClocksEventReason{name}"))
            if bits & bit:
                words.add(its)
                bits &= ~bit
        if bits:
            words.add(f"unknown reasons 0x{bits:x}")
        return frozenset(words)

    def _ask(self, name: str, *arguments: Any) -> Reading[Any]:
        try:
            return Reading(getattr(self._nvml, name)(self._handle, *arguments))
        except self._nvml.NVMLError as error:
            return Reading(None, self._why(error))

    def _why(self, error: Exception) -> str:
        return _reason(self._nvml, error, self._driver, self._is_part)


def _positive(reading: Reading[int]) -> Reading[int]:
    """Return a reading whose 0 is none: no GPU at work has such a value."""
    if reading.value == 0:
        return Reading(None, "NVML returns 0, which is no measurement")
    return reading


def _reason(nvml: Any, error: Any, driver: str, is_part: bool) -> str:
    """Return the reason and the remedy of an error of NVML."""
    for name, words in _REASONS.items():
        if error.value == getattr(nvml, name):
            if is_part and name in _HIDDEN_BY_MIG:
                return _MIG
            return words.format(driver=driver)
    return f"NVML fails: {error}"
