"""Seconds of a step, from one quiet device to the next."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

import torch


class StepClock:
    """Times steps one after another; the first `warmup_steps` do not count.

    Args:
        warmup_steps: first steps, kept in `all_step_seconds` only.
        device: on `cuda`, the clock waits for the device before it reads the time.
    """

    def __init__(self, warmup_steps: int, device: str) -> None:
        self._warmup_steps = warmup_steps
        self._device = device
        self.all_step_seconds: list[float] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the body as one step."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.all_step_seconds.append(time.perf_counter() - started)

    @property
    def step_seconds(self) -> float | None:
        """Median of the steps after warm-up; None if there are none."""
        steps = self.all_step_seconds[self._warmup_steps :]
        return statistics.median(steps) if steps else None

    @property
    def step_seconds_iqr(self) -> float | None:
        """Distance between the quartiles of the same steps; None below two steps."""
        return spread_of_quartiles(self.all_step_seconds[self._warmup_steps :])

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def spread_of_quartiles(values: Sequence[float]) -> float | None:
    """Distance between the quartiles; None below two values."""
    if len(values) < 2:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower
