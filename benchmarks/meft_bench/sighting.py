"""`Sighting`: what has been seen of a cell so far, however it ends."""

import dataclasses
import math
from typing import Any

from meft_bench.record import Measurement


class Sighting:
    """What has been seen of a cell so far."""

    def __init__(self) -> None:
        self.measurement = Measurement()
        self.environment: dict[str, str | int | None] = {}

    def note(self, **fields: Any) -> None:
        """Add fields of `Measurement`."""
        self.measurement = dataclasses.replace(self.measurement, **fields)


def finite(value: float) -> float | None:
    """`value`, or None: JSON has neither infinity nor not-a-number."""
    return value if math.isfinite(value) else None
