"""Meters of a GPU through NVML, on a fake one."""

import contextlib
import inspect
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pynvml
import pytest
import torch

from harness.fake_nvml import QUERIES, UUID, FakeNvml, last
from harness.tiny import cell
from meft_bench.child.measuring import gpu_watch
from meft_bench.child.measuring.gpu_watch import NVML_NUMBERS, GpuWatch
from meft_bench.child.measuring.measure import measure
from meft_bench.child.measuring.partial_result import PartialResult, remarks
from meft_bench.child.meters import copies, processes
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.meters.copies import copies_in
from meft_bench.child.meters.link import FASTEST, LinkMeter, UnwrappedCounter
from meft_bench.child.meters.power import PowerMeter
from meft_bench.child.meters.processes import ForeignProcesses, context_bytes
from meft_bench.child.meters.sampler import Sampler
from meft_bench.shared import nvml
from meft_bench.shared.nvml import CounterValue, NvmlGpu, Reading
from meft_bench.shared.source import Source

OWN = os.getpid()
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of a process that leads a session of its own."""
    its = [sys.executable, "-c", "input()"]
    with subprocess.Popen(its, stdin=subprocess.PIPE, start_new_session=True) as found:
        yield found.pid
        found.kill()


@contextlib.contextmanager
def opened(fake: FakeNvml) -> Iterator[NvmlGpu]:
    with nvml.open_gpu(fake, [UUID]) as gpu:
        assert gpu.value is not None
        yield gpu.value


# NVML


def test_the_fake_is_faithful() -> None:
    """Its functions have the parameters of the real ones."""
    for name in QUERIES:
        fake = [*inspect.signature(getattr(FakeNvml, name)).parameters][1:]
        real = inspect.unwrap(getattr(pynvml, name))
        assert fake == [*inspect.signature(real).parameters], name


def test_a_gpu_is_found_by_its_uuid_and_nvml_is_closed_again() -> None:
    """CUDA numbers GPUs otherwise than NVML does. A part of a GPU has another name."""
    fake = FakeNvml(uuid="MIG-1234")
    with nvml.open_gpu(fake, [UUID, "MIG-1234"]) as gpu:
        assert gpu.value is not None
        assert fake.num_open == 1
    assert fake.num_open == 0
    with nvml.open_gpu(fake, [UUID]) as gpu:
        assert gpu == Reading(None, f"NVML does not know {UUID}: Not Found")
    assert fake.num_open == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "install NVIDIA's driver or, in a"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "load or install it"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_TIMEOUT, "NVML fails: Timeout"),
    ],
)
def test_nvml_that_cannot_be_opened_says_what_helps(error: int, words: str) -> None:
    with nvml.open_gpu(FakeNvml(errors={"nvmlInit": error}), [UUID]) as gpu:
        assert gpu.value is None
        assert words in gpu.reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NOT_SUPPORTED, "nor driver 580.159.04 offers it"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "ask an administrator"),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, "driver 580.159.04 is too old"),
        (pynvml.NVML_ERROR_INVALID_ARGUMENT, "driver 580.159.04 does not know it"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, "NVML fails: GPU is lost"),
    ],
)
def test_a_query_that_is_refused_has_a_reason_and_no_value(
    error: int, words: str
) -> None:
    """Every query alone, while the others still have a value."""
    for name in QUERIES:
        fake = FakeNvml(processes={OWN: 10}, errors={name: error}, window_seconds=0.0)
        if "Open" in name or "Handle" in name:
            continue
        with opened(fake) as gpu:
            readings = every_reading(gpu)
        without = {name for name, one in readings.items() if one.value is None}
        assert len(without) <= 2, name
        assert all(words in readings[one].reason for one in without), name
        assert all(readings[one].reason == "" for one in readings.keys() - without)


def every_reading(gpu: NvmlGpu) -> dict[str, Reading[Any]]:
    """What a GPU says to each question."""
    readings: dict[str, Reading[Any]] = {}
    for name in (name for name in vars(NvmlGpu) if not name.startswith("_")):
        reading = getattr(gpu, name)()
        several = reading if isinstance(reading, tuple) else (reading,)
        readings |= {f"{name} {n}": one for n, one in enumerate(several)}
    return readings


def test_a_part_of_a_gpu_says_that_mig_hides_a_meter() -> None:
    """The counters are those of the whole GPU."""
    fake = FakeNvml(
        uuid="MIG-1",
        errors={"nvmlDeviceGetTotalEnergyConsumption": NOT_SUPPORTED},
        field_errors=dict.fromkeys((197, 198), pynvml.NVML_ERROR_INVALID_ARGUMENT),
    )
    with nvml.open_gpu(fake, ["MIG-1"]) as gpu:
        assert gpu.value is not None
        readings = (gpu.value.energy_millijoules(), *gpu.value.link_counters())
    for reading in readings:
        assert reading.value is None
        assert reading.reason.startswith("MIG hides it")


def test_zero_is_no_measurement() -> None:
    """Some drivers return it for what they do not have."""
    fake = FakeNvml(link=(0, 0, 0, 0), used_bytes=0)
    with opened(fake) as gpu:
        for reading in (gpu.link_generation(), gpu.link_width(), gpu.used_bytes()):
            assert reading.value is None
            assert reading.reason == "NVML returns 0, which is no measurement"


def test_an_old_driver_has_throttle_reasons_under_their_old_name() -> None:
    """Drivers before 535 call event reasons throttle reasons."""
    power_cap = pynvml.nvmlClocksEventReasonSwPowerCap
    too_old = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    errors = {"nvmlDeviceGetCurrentClocksEventReasons": too_old}
    with opened(FakeNvml(errors=errors, event_reasons=power_cap)) as gpu:
        assert gpu.throttle_reasons().value == frozenset({"power cap"})


def test_an_idle_gpu_is_not_throttled_and_an_unknown_reason_is_kept() -> None:
    bits = pynvml.nvmlClocksEventReasonGpuIdle | 1 << 40
    words = "unknown reasons 0x10000000000"
    with opened(FakeNvml(event_reasons=bits)) as gpu:
        assert gpu.throttle_reasons() == Reading(frozenset({words}))


# Link


def counted(
    readings: list[int], num_bits: int = 32, seconds: float = 0.02
) -> Reading[int]:
    counter = UnwrappedCounter(FASTEST)
    for n, value in enumerate(readings):
        shown = value % 2**num_bits
        counter.read(Reading(CounterValue(shown, num_bits)), n * seconds)
    return counter.total


@pytest.mark.parametrize("num_bits", [32, 64])
@pytest.mark.parametrize("start", [0, 2**32 - 1, 7 * 2**32 + 5])
def test_a_counter_is_unwrapped(num_bits: int, start: int) -> None:
    """Several wraps are all counted: 3 GiB from each reading to the next."""
    step = 3 * 2**30
    readings = [start + n * step for n in range(5)]
    assert counted(readings, num_bits) == Reading(4 * step)


def test_a_counter_of_32_bits_in_a_number_of_64_is_unwrapped() -> None:
    """Nothing but its values tells that it wraps."""
    counter = UnwrappedCounter(FASTEST)
    for n, value in enumerate((2**32 - 100, 2**32 + 50)):
        counter.read(Reading(CounterValue(value % 2**32, 64)), n * 0.02)
    assert counter.total == Reading(150)


def test_a_counter_that_may_have_wrapped_twice_is_unknown() -> None:
    """After half a second, a link of 121 GB/s may have moved 2^32 bytes many times;
    a counter that is known to be wider cannot have wrapped."""
    assert counted([0, 100], seconds=0.5).value is None
    assert "may have wrapped twice" in counted([0, 100], seconds=0.5).reason
    wide = [2**33, 2**33 + 100]
    assert counted(wide, num_bits=64, seconds=0.5) == Reading(100)


def test_a_counter_that_is_reset_or_missed_is_unknown() -> None:
    assert "was reset" in counted([2**33, 5], num_bits=64).reason
    counter = UnwrappedCounter(FASTEST)
    counter.read(Reading(CounterValue(5, 32)), 0.0)
    counter.read(Reading(None, "Timeout"), 0.02)
    counter.read(Reading(CounterValue(9, 32)), 0.04)
    assert counter.total == Reading(None, "Timeout")


def test_the_link_is_polled_while_a_step_runs() -> None:
    """3 GiB a reading, in 32 bits, of which one alone would show less than one."""
    step = 3 * 2**30
    fake = FakeNvml(sent=last(*(n * step for n in range(6))), received=last(7))
    with opened(fake) as gpu:
        with LinkMeter(gpu) as link:
            time.sleep(0.3)
    # The first reading only asks whether there are counters.
    assert (link.sent.value, link.received.value) == (4 * step, 0)
    assert link.source == Reading("counters")


def test_one_counter_that_is_missing_leaves_the_other() -> None:
    fake = FakeNvml(field_errors={197: NOT_SUPPORTED})
    with opened(fake) as gpu:
        with LinkMeter(gpu) as link:
            pass
    assert link.sent.value is None
    assert "offers it" in link.sent.reason
    assert link.received.value is not None
    assert link.received.value > 0


def test_without_counters_rates_are_sampled_and_the_record_says_so() -> None:
    """2 and 5 MB a second; too few windows are no estimate."""
    fake = FakeNvml(errors={"nvmlDeviceGetFieldValues": NOT_SUPPORTED})
    with opened(fake) as gpu:
        started = time.perf_counter()
        with LinkMeter(gpu) as link:
            time.sleep(0.3)
        seconds = time.perf_counter() - started
        with LinkMeter(gpu) as short:
            pass
    assert link.source == Reading("samples")
    assert link.sent.value is not None
    assert 0.3 * 2e6 <= link.sent.value <= seconds * 2e6
    assert short.sent.value is None
    assert "take a larger batch" in short.sent.reason
    fake.errors["nvmlDeviceGetPcieThroughput"] = NOT_SUPPORTED
    with opened(fake) as gpu:
        with LinkMeter(gpu) as link:
            pass
    assert (link.sent.value, link.source.value) == (None, None)


def test_an_exception_in_the_thread_of_a_sampler_is_raised() -> None:
    """At the end of the block, so that no meter stops in silence."""
    looks = itertools.count()

    def look() -> None:
        if next(looks):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Sampler(look, 0.001):
        time.sleep(0.05)


# Power


class Time:
    """A monotonic clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def measured(
    fake: FakeNvml, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> PowerMeter:
    """A meter of steps that take half a second each, with a look at every end."""
    clock = Time(monkeypatch)
    with opened(fake) as gpu:
        meter = PowerMeter(gpu)
        meter.look()
        for _ in range(num_steps):
            with meter.step():
                clock.now += 0.5
            meter.look()
            clock.now += 0.25
            meter.look()
    return meter


def test_energy_is_that_of_steps_and_not_of_what_is_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100 J in each step, 900 J between two; 200 W."""
    joules = itertools.accumulate([5, *itertools.chain(*[(100, 900)] * 4)])
    fake = FakeNvml(millijoules=(1000 * one for one in joules))
    meter = measured(fake, 4, monkeypatch)
    assert meter.step_energy_joules.value == pytest.approx(100.0)
    assert meter.mean_power_watts.value == pytest.approx(200.0)


def test_energy_is_interpolated_between_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that takes 300 W throughout takes 300 W in steps that no sample meets."""
    clock = Time(monkeypatch)
    fake = FakeNvml(millijoules=iter(range(7, 10**7, 300_000)))
    with opened(fake) as gpu:
        meter = PowerMeter(gpu)
        meter.look()
        for begin, end in ((0.2, 0.9), (1.3, 1.6), (2.1, 2.8)):
            clock.now = begin
            with meter.step():
                clock.now = end
            clock.now = math.ceil(end)
            meter.look()  # after every full second
    assert meter.mean_power_watts.value == pytest.approx(300.0)
    assert meter.step_energy_joules.value == pytest.approx(300.0 * 1.7 / 3)


def test_energy_is_unknown_where_the_counter_cannot_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too few steps, a counter that stands still, and none at all: never 0."""
    short = measured(FakeNvml(), 1, monkeypatch).step_energy_joules
    assert "raise `max_steps`" in short.reason
    still = measured(FakeNvml(millijoules=last(5)), 4, monkeypatch)
    assert "did not increase" in still.step_energy_joules.reason
    errors = {"nvmlDeviceGetTotalEnergyConsumption": NOT_SUPPORTED}
    none = measured(FakeNvml(errors=errors), 4, monkeypatch)
    assert "offers it" in none.mean_power_watts.reason
    for reading in (short, still.step_energy_joules, none.mean_power_watts):
        assert reading.value is None
    no_step = measured(FakeNvml(), 0, monkeypatch)
    for name in ("step_energy_joules", "sm_clock_megahertz", "throttle_reasons"):
        assert getattr(no_step, name) == Reading(None, "no step was timed")


def test_clocks_are_those_of_the_first_start_and_the_last_end() -> None:
    fake = FakeNvml()
    with opened(fake) as gpu:
        meter = PowerMeter(gpu)
        for clock in (1980, 1755, 1410):
            with meter.step():
                fake.clocks[pynvml.NVML_CLOCK_SM] = clock
    assert meter.sm_clock_megahertz == Reading([1980, 1410])
    assert meter.memory_clock_megahertz == Reading([3201, 3201])


def test_throttling_counts_in_timed_steps_only() -> None:
    """All reasons that were seen there, in words; `none` where there was none."""
    fake = FakeNvml()
    with opened(fake) as gpu:
        meter = PowerMeter(gpu)
        with meter.step():
            pass
        assert meter.throttle_reasons == Reading("none")
        fake.event_reasons = pynvml.nvmlClocksEventReasonHwThermalSlowdown
        meter.look()  # between two steps
        assert meter.throttle_reasons == Reading("none")
        with meter.step():
            fake.event_reasons = pynvml.nvmlClocksEventReasonSwPowerCap
            meter.look()
            fake.event_reasons = pynvml.nvmlClocksEventReasonSyncBoost
    assert meter.throttle_reasons == Reading("power cap, sync boost")


def test_warm_up_steps_are_not_measured() -> None:
    """As the clock does not count them."""
    with opened(FakeNvml()) as gpu:
        meter = PowerMeter(gpu)
        clock = StepClock(warmup_steps=2, device="cpu", meter=meter)
        for _ in range(2):
            with clock.step():
                pass
        assert meter.throttle_reasons.value is None
        with clock.step():
            pass
    assert meter.throttle_reasons == Reading("none")
    assert len(clock.all_step_seconds) == 3


# Processes


def foreign(
    fake: FakeNvml, *looks: dict[int, int | None], uses_gpu: bool = False
) -> Reading[int]:
    """How many foreign processes several looks find; `fake` has those of before."""
    with opened(fake) as gpu:
        counter = ForeignProcesses(gpu, uses_gpu)
        for processes_then in looks:
            fake.processes = processes_then
            counter.look()
    return counter.most


def test_processes_of_other_sessions_are_foreign(stranger: int) -> None:
    """Those of this session are the cell's own; at most two were there at a time."""
    alone: dict[int, int | None] = {OWN: 10}
    assert foreign(FakeNvml(), alone) == Reading(0)
    assert foreign(FakeNvml(), alone, {OWN: 10, stranger: 5}, alone) == Reading(1)
    two: dict[int, int | None] = {OWN: 10, stranger: 5, 2**22 + 1: 7}
    assert foreign(FakeNvml(), alone, two, {OWN: 10, stranger: 5}) == Reading(2)


def test_a_container_hides_who_is_foreign_unless_it_was_there_before() -> None:
    """NVML lists ids of the host there: this process is one of them, or none."""
    hidden: dict[int, int | None] = {2**22 + 1: 10}
    assert foreign(FakeNvml(), hidden) == Reading(None, processes.UNKNOWN_IDS)
    assert foreign(FakeNvml(), {}) == Reading(None, processes.UNKNOWN_IDS)
    before: dict[int, int | None] = {2**22 + 2: 5}
    assert foreign(FakeNvml(processes=before), hidden | before) == Reading(1)
    # A process that uses the GPU already may be what was listed before.
    found = foreign(FakeNvml(processes=before), before, uses_gpu=True)
    assert found == Reading(None, processes.UNKNOWN_IDS)


def test_what_cannot_be_listed_is_unknown() -> None:
    errors = {"nvmlDeviceGetComputeRunningProcesses": NOT_SUPPORTED}
    found = foreign(FakeNvml(errors=errors), {})
    assert found.value is None
    assert "offers it" in found.reason


def test_the_context_is_what_torch_has_not_reserved() -> None:
    """Unknown where NVML does not list this process, or without bytes."""
    for listed, found in (
        ({OWN: 700, 1: 5}, 500),
        ({1: 700}, None),
        ({OWN: None}, None),
        ({OWN: 0}, None),
        ({OWN: 100}, None),
    ):
        with opened(FakeNvml(processes=dict(listed))) as gpu:
            assert context_bytes(gpu, reserved_bytes=200).value == found


# Copies


def copy(name: str, num_bytes: int) -> dict[str, Any]:
    return {"cat": "gpu_memcpy", "name": name, "args": {"bytes": num_bytes}}


def test_copies_are_summed_by_direction() -> None:
    """Copies inside the device do not use the link; pageable ones are also apart."""
    found = copies_in(
        [
            {"cat": "kernel", "name": "gemm", "args": {}},
            {"name": "process_name", "args": {"name": "python"}},
            copy("Memcpy HtoD (Pinned -> Device)", 100),
            copy("Memcpy HtoD (Pageable -> Device)", 30),
            copy("Memcpy DtoH (Device -> Pageable)", 4),
            copy("Memcpy DtoD (Device -> Device)", 1000),
        ]
    )
    assert found.value == copies.Copies(
        profiled_h2d_bytes=130, profiled_d2h_bytes=4, profiled_pageable_bytes=34
    )


def test_a_profiler_that_sees_no_kernel_has_measured_no_copies() -> None:
    """Not 0 bytes: no training step is without a kernel."""
    found = copies_in([{"cat": "cpu_op", "name": "aten::mm", "args": {}}])
    assert found.value is None
    assert "CUPTI is missing" in found.reason


# A cell


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the meters ask of torch on a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100)
    monkeypatch.setattr(gpu_watch, "has_context", lambda: False)


def watch(fake: FakeNvml) -> PartialResult:
    """What a cell of three timed steps notes."""
    partial = PartialResult()
    with opened(fake) as gpu:
        watched = GpuWatch(gpu, partial)
        fake.processes |= {OWN: 600}
        watched.note_context()
        with watched.training():
            for _ in range(3):
                with watched.step():
                    time.sleep(0.01)
        watched.probe_link(lambda: time.sleep(0.05))
        watched.close()
    return partial


@pytest.mark.usefixtures("cuda")
def test_a_cell_notes_every_number_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meft_bench.child.meters.power.LEAST_SECONDS", 0.0)
    seen = watch(FakeNvml()).measurement
    assert [name for name in NVML_NUMBERS if getattr(seen, name) is None] == []
    assert seen.unmeasured is None
    assert (seen.context_bytes, seen.nvml_process_bytes) == (500, 600)
    assert (seen.link_generation, seen.link_generation_maximum) == (4, 5)
    assert (seen.num_foreign_processes, seen.pcie_source) == (0, "counters")
    assert remarks(seen) == ""


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", [n for n in QUERIES if "Handle" not in n])
def test_a_cell_without_one_query_has_all_other_numbers(name: str) -> None:
    """The numbers that are missing are null, never 0, and the record says why."""
    seen = watch(FakeNvml(errors={name: NOT_SUPPORTED})).measurement
    missing = [name for name in NVML_NUMBERS if getattr(seen, name) is None]
    its = {
        "nvmlDeviceGetComputeRunningProcesses": 3,
        "nvmlDeviceGetFieldValues": 3,  # the step is too short to sample rates
        "nvmlDeviceGetMemoryInfo": 1,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetCurrPcieLinkWidth": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkWidth": 1,
        "nvmlDeviceGetClockInfo": 2,
    }
    # The steps of this test are too short to measure their energy.
    assert len(missing) == 2 + its.get(name, 0), missing
    assert seen.unmeasured is not None
    for one in missing:
        assert one in seen.unmeasured


@pytest.mark.usefixtures("cuda")
def test_a_foreign_process_contaminates_a_record(stranger: int) -> None:
    """It is counted, and the record says what that means."""
    partial = watch(FakeNvml(processes={stranger: 10}))
    assert partial.measurement.num_foreign_processes == 1
    assert remarks(partial.measurement).startswith(
        "contaminated: another process was on the GPU"
    )


@pytest.mark.usefixtures("cuda")
def test_without_nvml_every_number_has_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a cell on a CPU has none, as nothing is missing there."""
    partial = PartialResult()
    monkeypatch.setattr(nvml, "load", lambda: Reading(None, "no package"))
    with gpu_watch.watched("cuda", partial) as found:
        assert found is None
    assert partial.measurement.unmeasured == f"{', '.join(NVML_NUMBERS)}: no package"
    on_cpu = PartialResult()
    with gpu_watch.watched("cpu", on_cpu) as found:
        assert found is None
    assert on_cpu.measurement.unmeasured is None


@pytest.mark.usefixtures("cuda")
def test_a_cell_that_fails_still_says_who_was_there(
    monkeypatch: pytest.MonkeyPatch,
    stranger: int,
) -> None:
    """Out of memory may be the fault of the other process."""
    fake, partial = FakeNvml(processes={stranger: 10, OWN: 600}), PartialResult()
    properties = type("Properties", (), {"uuid": "1234"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvml, "load", lambda: Reading(fake))

    def fail() -> None:
        with gpu_watch.watched("cuda", partial) as watched:
            assert watched is not None
            with watched.training(), watched.step():
                raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert partial.measurement.num_foreign_processes == 1
    assert fake.num_open == 0


def test_a_profiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: object) -> None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED\nand more")

    monkeypatch.setattr(gpu_watch, "profiled_copies", fail)
    partial = PartialResult()
    gpu_watch.probe_copies(lambda: None, partial)
    assert partial.measurement.profiled_h2d_bytes is None
    assert partial.measurement.unmeasured == (
        "profiled_h2d_bytes, profiled_d2h_bytes, profiled_pageable_bytes: torch's "
        "profiler fails: CUPTI_ERROR_NOT_INITIALIZED"
    )


@pytest.mark.usefixtures("cuda")
def test_the_watch_is_in_its_place_in_a_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cell on a CPU that is watched as one on a GPU has the numbers of NVML."""

    @contextlib.contextmanager
    def on_a_fake(device: str, partial: PartialResult) -> Iterator[GpuWatch]:
        with opened(FakeNvml(processes={OWN: 600})) as gpu:
            watched = GpuWatch(gpu, partial)
            yield watched
            watched.close()

    monkeypatch.setattr(gpu_watch, "watched", on_a_fake)
    monkeypatch.setattr("meft_bench.child.meters.power.LEAST_SECONDS", 0.0)
    partial = PartialResult()
    measure(cell(max_steps=4, warmup_steps=2), Source(), partial)
    seen = partial.measurement
    missing = [name for name in NVML_NUMBERS if getattr(seen, name) is None]
    assert missing == ["context_bytes"]  # noted where the context is made
    assert seen.profiled_h2d_bytes is None


# On a GPU


@pytest.mark.gpu
def test_the_profiler_counts_a_copy_to_the_byte() -> None:
    """A pinned copy of 4 MiB to the device, and a pageable one of 1 MiB back."""
    host = torch.empty(1 << 20, pin_memory=True)
    device = torch.empty(1 << 18, device="cuda")

    def step() -> None:
        host.cuda(non_blocking=True)
        device.cpu()

    found = copies.profiled_copies(step)
    assert found.value == copies.Copies(
        profiled_h2d_bytes=1 << 22,
        profiled_d2h_bytes=1 << 20,
        profiled_pageable_bytes=1 << 20,
    )


@pytest.mark.gpu
def test_the_link_moves_at_least_what_is_copied() -> None:
    """With headers, and less than twice of it, unless another process copies, too."""
    partial = PartialResult()
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    with gpu_watch.watched("cuda", partial) as watched:
        if watched is None:
            pytest.skip(f"no NVML here: {partial.measurement.unmeasured}")
        watched.probe_link(lambda: host.cuda(non_blocking=True))
    received = partial.measurement.pcie_rx_bytes
    if received is None:
        pytest.skip(f"no counters here: {partial.measurement.unmeasured}")
    assert 1 << 30 <= received < 1 << 31
