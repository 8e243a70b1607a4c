"""Partial results of a cell, which are available even if the cell fails."""

import math
from collections.abc import Sequence
from typing import Any

from meft_bench.shared.measurement import Measurement
from meft_bench.shared.nvml import Reading


class PartialResult:
    """The measurements of a cell so far."""

    def __init__(self) -> None:
        self.measurement = Measurement()
        self.environment: dict[str, str | int | None] = {}
        self.memory_breakdown: dict[str, Any] | None = None
        self._unmeasured: dict[str, str] = {}

    def note(self, **fields: Any) -> None:
        """Add numbers of `Measurement`."""
        self.measurement = self.measurement.with_numbers(**fields)

    def note_readings(self, **readings: Reading[Any]) -> None:
        """Add numbers of `Measurement`, or why there are none."""
        for name, reading in readings.items():
            self._unmeasured.pop(name, None)
            if reading.value is None:
                self._unmeasured[name] = reading.reason
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._unmeasured.items():
            by_reason.setdefault(reason, []).append(name)
        texts = [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
        self.note(
            **{name: reading.value for name, reading in readings.items()},
            unmeasured="; ".join(texts) or None,
        )


def remarks(measurement: Measurement) -> str:
    """Return the warnings about a cell that ended well, as one line; empty for none."""
    found = (
        remark(measurement.loss_curve),
        _undefined(measurement),
        _contaminated(measurement),
    )
    return "; ".join(filter(None, found))


def _contaminated(measurement: Measurement) -> str:
    """Return a warning if other processes used the GPU."""
    number = measurement.num_foreign_processes
    if not number:
        return ""
    others = "another process was" if number == 1 else f"{number} other processes were"
    return (
        f"contaminated: {others} on the GPU, so times and what NVML measures of the "
        "GPU cannot be compared; end them, or take a free GPU, and run with `--force`"
    )


def _undefined(measurement: Measurement) -> str:
    """Return a warning if the score is undefined, as a correlation can be."""
    if measurement.score_name is None or measurement.score is not None:
        return ""
    return (
        f"{measurement.score_name} is undefined: all predictions, or all true numbers, "
        "are equal or not finite"
    )


def remark(loss_curve: Sequence[float | None] | None) -> str:
    """Return a warning about a cell that ended well if its loss was not finite.

    Args:
        loss_curve: `Measurement.loss_curve`: the loss of each step, None where it was
            not finite.

    Returns:
        One line; empty if every loss was finite.
    """
    losses = loss_curve or []
    steps = [number for number, loss in enumerate(losses, start=1) if loss is None]
    if not steps:
        return ""
    first, count = steps[0], len(losses)
    if len(steps) == count - first + 1:
        return f"the loss was not finite from step {first} of {count} on"
    return (
        f"the loss was not finite in {len(steps)} of {count} steps, the first of them "
        f"step {first}"
    )


def finite(value: float) -> float | None:
    """Return `value`, or None if it is not finite: JSON has only finite numbers."""
    return value if math.isfinite(value) else None
