"""Seconds of a step, measured between two synchronisations of the device."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch


class StepMeter(Protocol):
    """Measures steps in addition to the clock."""

    def step(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of one step."""


class StepClock:
    """Time consecutive steps; the first `warmup_steps` are not counted.

    Args:
        warmup_steps: number of first steps, kept in `all_step_seconds` only.
        device: on `cuda`, the clock synchronises the device before it reads the time.
        meter: what else measures the steps after warm-up, at whose beginning and end
            the device is synchronised.
    """

    def __init__(
        self, warmup_steps: int, device: str, meter: StepMeter | None = None
    ) -> None:
        self._warmup_steps = warmup_steps
        self._device = device
        self._meter = meter
        self.all_step_seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the body as one step."""
        self._wait()
        with self._metered():
            started = time.perf_counter()
            yield
            self._wait()
            self.all_step_seconds.append(time.perf_counter() - started)

    def _metered(self) -> contextlib.AbstractContextManager[object]:
        is_warmup = len(self.all_step_seconds) < self._warmup_steps
        if is_warmup or self._meter is None:
            return contextlib.nullcontext()
        return self._meter.step()

    @property
    def step_seconds(self) -> float | None:
        """Median of the steps after warm-up in seconds; None if there are none."""
        steps = self.all_step_seconds[self._warmup_steps :]
        return statistics.median(steps) if steps else None

    @property
    def step_seconds_iqr(self) -> float | None:
        """Interquartile range of the same steps in seconds; None below two steps."""
        return spread_of_quartiles(self.all_step_seconds[self._warmup_steps :])

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def spread_of_quartiles(values: Sequence[float]) -> float | None:
    """Return the interquartile range; None below two values."""
    if len(values) < 2:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower
