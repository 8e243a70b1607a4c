"""Energy, clocks and throttling of a GPU during timed steps, from NVML.

    E(t)               the energy counter, sampled in a thread and interpolated
    energy of a step   mean of E(end) - E(start) over the steps
    mean power         the same energy / seconds of the steps
    clocks             at the start of the first timed step, at the end of the last
    throttle reasons   every reason for lower clocks that was seen in a timed step

What happens between steps, as validation, is not included. A reading takes 3 ms and the
counter changes up to every 100 ms only, so the thread samples it, not the steps, and
energy over less than a second is not returned.
"""

import contextlib
import time
from collections.abc import Iterator

import numpy

from meft_bench.shared.nvml import NvmlGpu, Reading

LEAST_SECONDS = 1.0
NO_REASON = "none"
"""What is returned if clocks were the highest throughout."""
_NO_STEP = "no step was timed"


class PowerMeter:
    """Measures the timed steps of a training.

    Args:
        gpu: the GPU.
    """

    def __init__(self, gpu: NvmlGpu) -> None:
        self._gpu = gpu
        self._steps: list[tuple[float, float]] = []
        """Start and end of each step in seconds, by a monotonic clock."""
        self._samples: list[tuple[float, int]] = []
        """Time and energy counter in millijoules."""
        self._no_energy = ""
        self._reasons: set[str] = set()
        self._no_reasons = _NO_STEP
        self._is_in_step = False
        self._clocks: dict[str, list[Reading[int]]] = {}

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure the body as one step; a body that raises is not counted."""
        if not self._steps:
            self._read_clocks()
        started = time.perf_counter()
        self._is_in_step = True
        try:
            yield
            ended = time.perf_counter()
            self._read_reasons()
        finally:
            self._is_in_step = False
        self._read_clocks()
        self._steps.append((started, ended))

    def look(self) -> None:
        """Sample the energy, and in a step, why clocks are lower.

        Look before the first step, from time to time, and after the last step.
        """
        energy = self._gpu.energy_millijoules()
        if energy.value is None:
            self._no_energy = energy.reason
        else:
            self._samples.append((time.perf_counter(), energy.value))
        if self._is_in_step:
            self._read_reasons()

    def _read_reasons(self) -> None:
        reading = self._gpu.throttle_reasons()
        if reading.value is None:
            self._no_reasons = reading.reason
        else:
            self._no_reasons = ""
            self._reasons |= reading.value

    def _read_clocks(self) -> None:
        clocks = {
            "sm": self._gpu.sm_clock_megahertz(),
            "memory": self._gpu.memory_clock_megahertz(),
        }
        for name, clock in clocks.items():
            first = self._clocks.get(name, [clock])[0]
            self._clocks[name] = [first, clock]

    @property
    def step_energy_joules(self) -> Reading[float]:
        """The mean energy of a step."""
        return self._joules().then(lambda joules: joules / len(self._steps))

    @property
    def mean_power_watts(self) -> Reading[float]:
        """The mean power over the steps."""
        return self._joules().then(lambda joules: joules / self._seconds)

    @property
    def _seconds(self) -> float:
        return sum(ended - started for started, ended in self._steps)

    def _joules(self) -> Reading[float]:
        if not self._steps:
            return Reading(None, _NO_STEP)
        if self._no_energy:
            return Reading(None, self._no_energy)
        if self._seconds < LEAST_SECONDS:
            return Reading(
                None,
                f"the timed steps took less than {LEAST_SECONDS:g} s, too short for "
                "the energy counter: raise `max_steps`",
            )
        times, millijoules = zip(*self._samples, strict=True)
        at_ends = numpy.interp(numpy.array(self._steps), times, millijoules)
        total = float((at_ends[:, 1] - at_ends[:, 0]).sum())
        if total <= 0:
            return Reading(None, "the energy counter did not increase during the steps")
        return Reading(total / 1000)

    @property
    def sm_clock_megahertz(self) -> Reading[list[int]]:
        """Clocks of the multiprocessors at start and end."""
        return self._clock("sm")

    @property
    def memory_clock_megahertz(self) -> Reading[list[int]]:
        """Clocks of the memory at start and end."""
        return self._clock("memory")

    def _clock(self, name: str) -> Reading[list[int]]:
        if not self._steps:
            return Reading(None, _NO_STEP)
        found: list[int] = []
        for clock in self._clocks[name]:
            if clock.value is None:
                return Reading(None, clock.reason)
            found.append(clock.value)
        return Reading(found)

    @property
    def throttle_reasons(self) -> Reading[str]:
        """Every reason that was seen, in words; `NO_REASON` if none was."""
        if self._no_reasons and not self._reasons:
            return Reading(None, self._no_reasons)
        return Reading(", ".join(sorted(self._reasons)) or NO_REASON)
