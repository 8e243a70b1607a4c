"""Bytes over the GPU's PCIe link, as NVML counts them.

The counters are those of the GPU: *sent* bytes go to the host, *received* ones come
from it, both with protocol headers and for all processes. They only increase, on some
drivers in 32 bits, where a busy link wraps them within tenths of a second:

    growth = (reading - last reading) mod 2^32

This is the growth if the counter wrapped at most once between two readings. A thread
therefore reads every 20 ms, in which a link of 16 lanes of PCIe 5 moves a third of
2^32 bytes. If two readings were so far apart that the link could have moved 2^32 bytes,
the growth is unknown, and no number is returned.

Where a driver has no counters, NVML's rates are sampled instead: each is the mean of a
window of 20 ms, of one direction after the other, so the result is an estimate from at
most half of the time.
"""

import statistics
import time

from meft_bench.child.meters.sampler import Sampler
from meft_bench.shared.nvml import CounterValue, NvmlGpu, Reading

POLL_SECONDS = 0.02
WRAP = 1 << 32
LEAST_SAMPLES = 5
"""Number of windows of each direction below which rates are no estimate."""
LANE_RATES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second of one lane in one direction, by the generation of PCIe."""
FASTEST = 16 * LANE_RATES[6]
"""Bytes a second of the fastest link that there is."""

COUNTERS, SAMPLES = "counters", "samples"


class LinkMeter:
    """Bytes over the link of a GPU during a `with` block.

    Args:
        gpu: the GPU.
    """

    def __init__(self, gpu: NvmlGpu) -> None:
        self._gpu = gpu
        self._has_counters = any(a.value is not None for a in gpu.link_counters())
        rate = fastest_rate(gpu)
        self._counters = (UnwrappedCounter(rate), UnwrappedCounter(rate))
        self._rates: tuple[list[int], list[int]] = ([], [])
        self._why = ["", ""]
        self._seconds = 0.0
        look = self._read if self._has_counters else self._sample
        self._sampler = Sampler(look, POLL_SECONDS if self._has_counters else 0.001)

    def __enter__(self) -> "LinkMeter":
        self._started = time.perf_counter()
        self._sampler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._started
        self._sampler.__exit__()

    @property
    def sent(self) -> Reading[int]:
        """Bytes from the GPU to the host."""
        return self._total(0)

    @property
    def received(self) -> Reading[int]:
        """Bytes from the host to the GPU."""
        return self._total(1)

    @property
    def source(self) -> Reading[str]:
        """What the numbers of bytes come from: `COUNTERS` or `SAMPLES`."""
        totals = (self.sent, self.received)
        if all(total.value is None for total in totals):
            return Reading(None, totals[0].reason)
        return Reading(COUNTERS if self._has_counters else SAMPLES)

    def _total(self, direction: int) -> Reading[int]:
        if self._has_counters:
            return self._counters[direction].total
        rates = self._rates[direction]
        if self._why[direction]:
            return Reading(None, self._why[direction])
        if len(rates) < LEAST_SAMPLES:
            return Reading(
                None,
                "the driver has no counters of the link, and the step was too short to "
                "sample rates: take a larger batch",
            )
        return Reading(round(statistics.fmean(rates) * self._seconds))

    def _read(self) -> None:
        readings, now = self._gpu.link_counters(), time.perf_counter()
        for counter, reading in zip(self._counters, readings, strict=True):
            counter.read(reading, now)

    def _sample(self) -> None:
        for direction, rate in enumerate(self._gpu.link_rates()):
            if rate.value is None:
                self._why[direction] = rate.reason
            else:
                self._rates[direction].append(rate.value)


class UnwrappedCounter:
    """The growth of a counter since its first reading.

    Args:
        bytes_per_second: the highest rate at which the counter can increase.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._grown = 0
        self._last = 0
        self._last_seconds: float | None = None
        self._is_wide = False
        self._reason = ""

    @property
    def total(self) -> Reading[int]:
        """The growth in bytes."""
        if self._reason:
            return Reading(None, self._reason)
        if self._last_seconds is None:
            return Reading(None, "the counter was not read")
        return Reading(self._grown)

    def read(self, reading: Reading[CounterValue], seconds: float) -> None:
        """Add a reading.

        Args:
            reading: the reading, or why there is none.
            seconds: time of the reading, by a monotonic clock.
        """
        if reading.value is None:
            # One missed reading may hide a wrap. The first reason is the cause.
            self._reason = self._reason or reading.reason
            return
        value = reading.value.value
        # Some drivers return a counter of 32 bits in 64: a larger value is the proof.
        self._is_wide = self._is_wide or value >= WRAP
        if self._last_seconds is not None:
            self._add(value, seconds - self._last_seconds)
        self._last, self._last_seconds = value, seconds

    def _add(self, value: int, gap_seconds: float) -> None:
        if self._reason:
            return
        if self._is_wide and value < self._last:
            self._reason = "the counter was reset during the step: measure again"
        elif not self._is_wide and gap_seconds * self._bytes_per_second >= WRAP:
            self._reason = (
                f"the counter was not read for {gap_seconds:.2g} s, in which it may "
                "have wrapped twice: run fewer cells at the same time"
            )
        self._grown += (
            value - self._last if self._is_wide else (value - self._last) % WRAP
        )


def fastest_rate(gpu: NvmlGpu) -> float:
    """Return the bytes a second of a GPU's link at its best, in one direction."""
    lane = LANE_RATES.get(gpu.link_generation_maximum().value or 0)
    width = gpu.link_width_maximum().value
    return FASTEST if lane is None or width is None else lane * width
