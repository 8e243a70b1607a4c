"""Which meters of a real GPU work on this machine, and why the others do not.

Each meter is tried once on each GPU that a cell can use, without a CUDA context: it
has a reading, or it says what is missing and what helps. What only torch can tell,
which the parent does not import, is judged by its version.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.parent.engines import environment
from meft_bench.shared import distributions, nvml
from meft_bench.shared.nvml import NvmlGpu, Reading

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The namespace of process ids in which Linux starts; those of containers differ."""
OWN_IDS = (
    "unsure: this container has process ids of its own, by which NVML may not know the "
    "cell; if its numbers are null, start the container with `--pid=host`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMeter:
    """A meter, and how to find out whether it works."""

    name: str
    numbers: tuple[str, ...]
    """Numbers of a measurement that it gives."""
    ask: Callable[[NvmlGpu], Reading[Any]]
    """Returns a reading of the meter."""
    counts_processes: bool = False
    """Whether it needs NVML to know the cell by its process id."""


def _link_bytes(gpu: NvmlGpu) -> Reading[Any]:
    readings = gpu.link_counters()
    without = [reading for reading in readings if reading.value is None]
    if len(without) < len(readings):  # of one that is missing, rates are not used
        return without[0] if without else readings[0]
    rates = gpu.link_rates()
    found = next((rate for rate in rates if rate.value is None), None)
    return without[0] if found else Reading(f"by samples only: {without[0].reason}")


def _link_speed(gpu: NvmlGpu) -> Reading[Any]:
    readings = (gpu.link_generation(), gpu.link_width())
    return next((one for one in readings if one.value is None), readings[0])


def _clocks(gpu: NvmlGpu) -> Reading[Any]:
    readings = (gpu.sm_clock_megahertz(), gpu.memory_clock_megahertz())
    return next((one for one in readings if one.value is None), readings[0])


METERS = (
    GpuMeter(
        name="process memory",
        numbers=("nvml_process_bytes", "context_bytes"),
        ask=NvmlGpu.processes,
        counts_processes=True,
    ),
    GpuMeter(
        name="device memory", numbers=("nvml_device_bytes",), ask=NvmlGpu.used_bytes
    ),
    GpuMeter(
        name="link bytes",
        numbers=("pcie_rx_bytes", "pcie_tx_bytes"),
        ask=_link_bytes,
    ),
    GpuMeter(
        name="link speed", numbers=("link_generation", "link_width"), ask=_link_speed
    ),
    GpuMeter(
        name="energy",
        numbers=("step_energy_joules", "mean_power_watts"),
        ask=NvmlGpu.energy_millijoules,
    ),
    GpuMeter(
        name="clocks",
        numbers=("sm_clock_megahertz", "memory_clock_megahertz"),
        ask=_clocks,
    ),
    GpuMeter(
        name="throttling", numbers=("throttle_reasons",), ask=NvmlGpu.throttle_reasons
    ),
    GpuMeter(
        name="foreign processes",
        numbers=("num_foreign_processes",),
        ask=NvmlGpu.processes,
        counts_processes=True,
    ),
)
"""Meters that NVML has, in the order in which they are shown."""

BY_TORCH = {
    "allocator": ("peak_requested_bytes", "peak_active_bytes", "peak_reserved_bytes"),
    "pinned memory": ("peak_pinned_bytes",),
    "profiled copies": ("profiled_h2d_bytes", "profiled_d2h_bytes"),
}
"""Meters of a GPU that torch has, with their numbers."""
ALL = "all of a GPU"
"""Name of the one line for the meters of both kinds where there is no GPU."""


def states() -> Iterator[tuple[str, str]]:
    """Yield the name of each meter, and `yes: NUMBERS` or `no: REASON`."""
    yield "host peak", _host_peak()
    gpus = environment.gpus()
    if not gpus:
        yield ALL, f"no: no GPU: {_why_no_gpu()}"
        return
    why_no_cuda = _why_no_cuda(distributions.installed("torch"))
    for name, numbers in BY_TORCH.items():
        yield name, f"no: {why_no_cuda}" if why_no_cuda else _yes(numbers)
    for meter in METERS:
        yield meter.name, _on_all(meter, gpus)


def _why_no_gpu() -> str:
    module = nvml.load()
    reason = module.reason if module.value is None else nvml.why_closed(module.value)
    return reason or environment.why_no_gpu()


def _yes(numbers: Sequence[str], remark: str = "") -> str:
    return f"yes: {', '.join(numbers)}{remark}"


def _host_peak(status: Path = Path("/proc/self/status")) -> str:
    try:
        is_there = "VmHWM:" in status.read_text()
    except OSError:
        is_there = False
    if is_there:
        return _yes(["peak_host_bytes"])
    return "no: the system has no VmHWM in /proc/self/status: run on Linux"


def _why_no_cuda(torch_version: str | None) -> str:
    if torch_version is None:
        return "torch is missing: python -m pip install torch"
    if torch_version.endswith("+cpu"):
        return (
            f"torch {torch_version} is built without support for a GPU: install a "
            "build with CUDA"
        )
    return ""


def _on_all(meter: GpuMeter, gpus: Sequence[environment.PhysicalGpu]) -> str:
    """Return whether a meter works on all GPUs, or on which of them it does not."""
    found = [_on(meter, gpu) for gpu in gpus]
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(
        f"{gpu.model} {gpu.uuid}: {state}"
        for gpu, state in zip(gpus, found, strict=True)
    )


def _on(meter: GpuMeter, gpu: environment.PhysicalGpu) -> str:
    module = nvml.load()
    if module.value is None:
        return f"no: {module.reason}"
    with nvml.open_gpu(module.value, [gpu.uuid]) as opened:
        if opened.value is None:
            return f"no: {opened.reason}"
        reading = meter.ask(opened.value)
    if reading.value is None:
        return f"no: {reading.reason}"
    if meter.counts_processes and not in_first_namespace():
        return OWN_IDS
    is_remark = isinstance(reading.value, str)
    return _yes(meter.numbers, f", {reading.value}" if is_remark else "")


def in_first_namespace(link: Path = Path("/proc/self/ns/pid")) -> bool:
    """Return whether process ids are those of the machine, and not of a container."""
    try:
        return str(link.readlink()) == _FIRST_PID_NAMESPACE
    except OSError:  # another system than Linux
        return True
