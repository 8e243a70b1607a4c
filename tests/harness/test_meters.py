import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.tiny import batch, cell, classifier
from meft_bench.child.meters import memory
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.meters.nvml import LinkMeter, open_device, process_bytes
from meft_bench.child.training.steps import Stepper

FLOAT = torch.float32.itemsize

# Clock


def test_warm_up_steps_are_kept_but_not_summarised() -> None:
    """The median and the quartiles are of the steps after them."""
    clock = StepClock(warmup_steps=2, device="cpu")
    clock.all_step_seconds = [9.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert clock.step_seconds == 3.0
    assert clock.step_seconds_iqr == 2.0


def test_a_step_takes_as_long_as_its_body() -> None:
    """What happens between two steps does not count."""
    clock = StepClock(warmup_steps=0, device="cpu")
    with clock.step():
        time.sleep(0.02)
    time.sleep(0.05)
    with clock.step():
        pass
    assert len(clock.all_step_seconds) == 2
    assert clock.all_step_seconds[0] >= 0.02
    assert clock.all_step_seconds[1] < 0.05


def test_without_a_step_after_warm_up_there_is_no_time() -> None:
    """None, not 0: it was not measured. One step has a median and no spread."""
    clock = StepClock(warmup_steps=1, device="cpu")
    clock.all_step_seconds = [1.0]
    assert (clock.step_seconds, clock.step_seconds_iqr) == (None, None)
    clock.all_step_seconds = [1.0, 2.0]
    assert (clock.step_seconds, clock.step_seconds_iqr) == (2.0, None)


# Memory


def test_the_peak_is_the_most_held_at_once_not_the_sum() -> None:
    """300 floats, then 100 more while the 300 are alive; the last 200 come after."""

    def step() -> None:
        first = torch.empty(300)
        second = torch.empty(100)
        del first
        third = torch.empty(200)
        del second, third

    assert memory.cpu_step_peak_bytes(step) == 400 * FLOAT


def test_what_the_step_keeps_counts_and_what_was_there_does_not() -> None:
    """The sum starts from zero when the step starts."""
    before = torch.empty(1000)
    kept = [before]
    got = memory.cpu_step_peak_bytes(lambda: kept.append(torch.empty_like(before)))
    assert got == 1000 * FLOAT


def test_model_state_memory_is_parameters_buffers_gradients_and_state() -> None:
    """Each storage once, however many tensors view it."""
    model = torch.nn.Linear(3, 5, bias=False)
    model.register_buffer("twice", model.weight.detach().view(-1))
    model.register_buffer("own", torch.zeros(7))
    optimizer = torch.optim.AdamW(model.parameters())
    weight = 3 * 5 * FLOAT
    assert memory.model_state_bytes(model, optimizer) == weight + 7 * FLOAT
    model(torch.ones(3)).sum().backward()
    assert memory.model_state_bytes(model, optimizer) == 2 * weight + 7 * FLOAT
    optimizer.step()
    # exp_avg, exp_avg_sq, and the step counter, a float of its own
    assert memory.model_state_bytes(model, optimizer) == 4 * weight + 8 * FLOAT


def test_saved_bytes_are_what_a_linear_keeps_for_backward() -> None:
    """A linear layer keeps its input; its weight and the batch are there anyway."""
    first, second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)
    model = torch.nn.Sequential(first, second)
    data = {"x": torch.ones(3, 4)}
    got = memory.saved_by_forward(model, data, lambda b: model(b["x"]).sum())
    assert got == 3 * 6 * FLOAT


def test_a_step_of_full_fine_tuning_holds_every_gradient_at_once() -> None:
    """At the end of its backward; afterwards they are let go."""
    model = classifier().train()
    stepper = Stepper(model, cell())
    stepper.step([batch()], 0.0)
    gradients = sum(p.numel() for p in model.parameters()) * FLOAT
    assert memory.cpu_step_peak_bytes(lambda: stepper.step([batch()], 0.0)) >= gradients
    assert memory.model_state_bytes(model, stepper.optimizer) < 4 * gradients


def test_the_host_peak_is_read_from_the_kernel(tmp_path: Path) -> None:
    """`VmHWM` is in KiB; another system's silence is None."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t   123 kB\n")
    assert memory.host_peak_bytes(status) == 123 * 1024
    status.write_text("Name:\tpython\n")
    assert memory.host_peak_bytes(status) is None
    assert memory.host_peak_bytes(tmp_path / "absent") is None


# NVML


class _FakeNvmlError(Exception):
    pass


@dataclass
class _FakeNvml:
    """NVML with one device, whose counters show the values given, one a read."""

    uuid: str = "GPU-1234"
    processes: list[SimpleNamespace] | None = None
    readings: dict[int, list[int]] = field(default_factory=dict)
    is_32_bit: bool = False
    is_installed: bool = True
    is_open: bool = False

    NVMLError = _FakeNvmlError
    NVML_SUCCESS = 0
    NVML_VALUE_TYPE_UNSIGNED_INT = 1
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES = 197
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 198

    def nvmlInit(self) -> None:
        if not self.is_installed:
            raise _FakeNvmlError("NVML Shared Library Not Found")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise _FakeNvmlError("Not Found")
        return "device"

    def nvmlDeviceGetComputeRunningProcesses(self, device: str) -> object:
        if self.processes is None:
            raise _FakeNvmlError("Not Supported")
        return self.processes

    def nvmlDeviceGetFieldValues(
        self, device: str, fields: list[int]
    ) -> list[SimpleNamespace]:
        return [self._field(number) for number in fields]

    def _field(self, number: int) -> SimpleNamespace:
        values = self.readings.get(number, [])
        if not values:
            return SimpleNamespace(nvmlReturn=3)  # not supported
        value = values.pop(0) if len(values) > 1 else values[0]
        return SimpleNamespace(
            nvmlReturn=0,
            valueType=1 if self.is_32_bit else 3,
            value=SimpleNamespace(uiVal=value % 2**32, ullVal=value),
        )


def read_link(nvml: _FakeNvml, seconds: float = 0.0) -> tuple[int | None, int | None]:
    with LinkMeter(nvml, "device") as link:
        time.sleep(seconds)
    return link.tx_bytes, link.rx_bytes


def test_the_link_counts_what_came_after_the_first_reading() -> None:
    """Sent and received apart, in 64 bits where the driver has them."""
    big = 10 * 2**32
    nvml = _FakeNvml(readings={197: [100, 150], 198: [big, big + 2**33]})
    assert read_link(nvml) == (50, 2**33)


def test_a_counter_of_32_bits_is_unwrapped() -> None:
    """Polled often enough, several wraps in one block are all counted.

    The counter moves by 3 GiB a reading, of which a 32-bit counter shows the rest.
    """
    step = 3 * 2**30
    readings = [n * step for n in range(5)]
    nvml = _FakeNvml(readings={197: list(readings), 198: [7]}, is_32_bit=True)
    assert read_link(nvml, seconds=0.3) == (4 * step, 0)


def test_an_unsupported_counter_is_none_and_not_zero() -> None:
    """Next to a counter that works."""
    assert read_link(_FakeNvml(readings={198: [5, 5]})) == (None, 0)


def test_a_device_is_found_by_its_uuid_and_closed_again() -> None:
    """CUDA numbers devices otherwise than NVML does."""
    nvml = _FakeNvml()
    with open_device(nvml, "1234") as device:
        assert device == "device"
        assert nvml.is_open
    assert not nvml.is_open


@pytest.mark.parametrize(
    "nvml", [_FakeNvml(uuid="GPU-other"), _FakeNvml(is_installed=False)]
)
def test_without_the_device_or_nvml_there_is_no_handle(nvml: _FakeNvml) -> None:
    """No exception: the cell is measured without NVML."""
    with open_device(nvml, "1234") as device:
        assert device is None
    assert not nvml.is_open


def test_memory_is_that_of_the_given_process() -> None:
    """Among all processes on the device."""
    processes = [
        SimpleNamespace(pid=1, usedGpuMemory=10),
        SimpleNamespace(pid=2, usedGpuMemory=20),
    ]
    assert process_bytes(_FakeNvml(processes=processes), "device", pid=2) == 20


@pytest.mark.parametrize(
    "nvml",
    [
        _FakeNvml(processes=[SimpleNamespace(pid=1, usedGpuMemory=10)]),
        _FakeNvml(processes=[SimpleNamespace(pid=2, usedGpuMemory=None)]),
        _FakeNvml(processes=None),
    ],
    ids=["another process id, as in a container", "no figure", "no support"],
)
def test_memory_nvml_does_not_know_is_none_and_not_zero(nvml: _FakeNvml) -> None:
    """A missing figure must not look like a small one."""
    assert process_bytes(nvml, "device", pid=2) is None


# On a GPU


@pytest.mark.gpu
def test_cuda_peaks_hold_what_the_step_allocates() -> None:
    """Reserved covers allocated, and allocated the block of the step."""

    def step() -> None:
        torch.empty(1 << 20, device="cuda")

    allocated, reserved = memory.cuda_step_peak_bytes(step)
    assert reserved >= allocated >= (1 << 20) * FLOAT
