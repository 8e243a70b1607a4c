"""NVML's counters: bytes over the device's link, and device memory of this process.

The PCIe counters (NVML fields 197 and 198) are those of the device: `tx` counts bytes
sent to the host, `rx` bytes received, including protocol headers and other processes.
They only increase, on some drivers in 32 bits, where a busy link wraps them within
tenths of a second; so a thread reads them every 20 ms and sums the differences.

A counter that the driver does not offer, and a process that NVML does not list (NVML
uses the host's process ids, which a container hides), are None and never 0. The `nvml`
argument is the module `pynvml`.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

_POLL_SECONDS = 0.02
_WRAP = 1 << 32


@contextlib.contextmanager
def open_device(nvml: Any, uuid: str) -> Iterator[Any]:
    """Provide the NVML handle of the device with `uuid`; None if not available.

    NVML numbers devices in another order than CUDA, so the UUID is used
    (`torch.cuda.get_device_properties(0).uuid`, without the leading `GPU-`).
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError:
            handle = None
        yield handle
    finally:
        nvml.nvmlShutdown()


def process_bytes(nvml: Any, device: Any, pid: int | None = None) -> int | None:
    """Return the device memory that NVML attributes to a process.

    Args:
        nvml: the module `pynvml`.
        device: an NVML handle.
        pid: id of the process; None for this process.

    Returns:
        Number of bytes; None where NVML does not list the process.
    """
    pid = os.getpid() if pid is None else pid
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    except nvml.NVMLError:
        return None
    used: dict[int, int | None] = {p.pid: p.usedGpuMemory for p in processes}
    return used.get(pid)


class LinkMeter:
    """Bytes over the device's PCIe link during a `with` block.

    `rx_bytes` and `tx_bytes` are None before the block ends, and afterwards where the
    driver does not offer the counters.
    """

    def __init__(self, nvml: Any, device: Any) -> None:
        tx, rx = (
            nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
            nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES,
        )
        self._counters = {field: _Counter(nvml, device, field) for field in (tx, rx)}
        self._tx, self._rx = tx, rx
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.tx_bytes: int | None = None
        self.rx_bytes: int | None = None

    def __enter__(self) -> "LinkMeter":
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()
        self.tx_bytes = self._counters[self._tx].total
        self.rx_bytes = self._counters[self._rx].total

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        for counter in self._counters.values():
            counter.read()


class _Counter:
    """An unwrapped hardware counter: `total` is its growth since the first read."""

    def __init__(self, nvml: Any, device: Any, field: int) -> None:
        self._nvml = nvml
        self._device = device
        self._field = field
        self._last: int | None = None
        self.total: int | None = 0

    def read(self) -> None:
        value, wrap = self._value()
        if value is None or self.total is None:
            self.total = None  # one missed read may hide a wrap
            return
        if self._last is not None:
            grown = value - self._last
            self.total += grown % wrap if wrap else grown
        self._last = value

    def _value(self) -> tuple[int | None, int]:
        """Return (value, modulus of its wrap); the modulus is 0 if it does not wrap."""
        nvml = self._nvml
        try:
            (field,) = nvml.nvmlDeviceGetFieldValues(self._device, [self._field])
        except nvml.NVMLError:
            return None, 0
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            return None, 0
        if field.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
            return field.value.uiVal, _WRAP
        return field.value.ullVal, 0
