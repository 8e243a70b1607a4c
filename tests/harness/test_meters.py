import time
from pathlib import Path

import pytest
import torch

from harness.tiny import batch, cell, classifier
from meft_bench.child.meters import memory
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.training.steps import Stepper
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu

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


# Memory of a GPU


def test_the_allocators_counts_are_in_order() -> None:
    """Requested <= allocated <= active <= reserved, on a virtual GPU as on a real one.

    A request of 1000 bytes takes a block of 1024 in a segment of 2 MiB.
    """
    with VirtualGpu(gpu.find("H200")) as device, device.new_ledger():
        peaks = memory.cuda_step_peaks(
            lambda: torch.empty(1000, dtype=torch.uint8, device="cuda")
        )
    assert peaks.peak_pinned_bytes.value is None
    assert in_order(peaks) == [1000, 1024, 1024, 2**21]


def in_order(peaks: memory.CudaPeaks) -> list[int]:
    """Requested, allocated, active and reserved bytes."""
    found = (
        peaks.peak_requested_bytes.value,
        peaks.peak_allocated_bytes.value,
        peaks.peak_active_bytes.value,
        peaks.peak_reserved_bytes.value,
    )
    assert None not in found
    return [value for value in found if value is not None]


def test_an_allocator_that_does_not_count_has_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cudaMallocAsync reports 0 for requested and active bytes."""
    with VirtualGpu(gpu.find("H200")) as device, device.new_ledger():
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"x": 1})
        peaks = memory.cuda_step_peaks(lambda: torch.empty(1000, device="cuda"))
    for reading in (peaks.peak_requested_bytes, peaks.peak_active_bytes):
        assert reading.value is None
        assert reading.reason.endswith("use the native one")
    assert peaks.peak_allocated_bytes.value == 4096


@pytest.mark.parametrize(
    ("stats", "found"),
    [
        ({"allocated_bytes.peak": 64, "active_bytes.peak": 32}, 64 + 5),
        ({"allocated_bytes.peak": 32, "reserved_bytes.peak": 64}, 64 + 5),
        ({}, None),
    ],
    ids=["torch", "older torch", "no GPU"],
)
def test_pinned_memory_is_torchs_and_that_of_rows(
    monkeypatch: pytest.MonkeyPatch, stats: dict[str, int], found: int | None
) -> None:
    """All blocks of torch's allocator, and what is registered without it."""
    monkeypatch.setattr(memory, "page_locked_bytes", lambda: 5)
    assert memory.pinned_bytes(stats).value == found
    assert bool(memory.pinned_bytes(stats).reason) == (found is None)


# On a GPU


@pytest.mark.gpu
def test_cuda_peaks_hold_what_the_step_allocates() -> None:
    """Reserved covers allocated, and allocated the block of the step."""

    def step() -> None:
        torch.empty(1 << 20, device="cuda")

    peaks = memory.cuda_step_peaks(step)
    requested, *others = in_order(peaks)
    assert (1 << 20) * FLOAT <= requested
    assert [requested, *others] == sorted([requested, *others])
    assert peaks.peak_pinned_bytes.value is not None
