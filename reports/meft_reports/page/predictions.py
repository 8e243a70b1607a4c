"""Predicted peaks against those of the GPU itself: the same cell on both.

    error    predicted / measured - 1

A pair is a cell on `cuda` and the same one on the virtual GPU of the same name, equal
in every field but the device. Errors above 0 are predictions that are too high.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from meft_reports.page.settings import Setting
from meft_reports.summary import WORKLOAD

COMPARED = ("saved_bytes", "peak_allocated_bytes", "peak_reserved_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionError:
    """One number of a setting, predicted and measured."""

    setting: Setting
    """The measured one."""
    predicted_cell: int
    quantity: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """The relative error."""
        return self.predicted / self.measured - 1

    def to_json(self) -> dict[str, Any]:
        """Return the row of the number in the page's data."""
        return {
            "w": self.setting.workload.index,
            "cell": self.setting.cells[0]["index"],
            "other": self.predicted_cell,
            "method": self.setting.method,
            "name": self.setting.name,
            "quantity": self.quantity,
            "measured": self.measured,
            "predicted": self.predicted,
            "error": 100 * self.error,
            "is_assumed": self.setting.options.get("active_fraction", 1.0) != 1.0,
        }


def prediction_errors(settings: Sequence[Setting]) -> list[PredictionError]:
    """Return the errors of every setting that was measured and predicted."""
    predicted = {
        _key(setting): setting
        for setting in settings
        if setting.ok and setting.workload.fields["device"].startswith("virtual-")
    }
    found = []
    for setting in settings:
        if setting.workload.fields["device"] != "cuda" or not setting.ok:
            continue
        other = predicted.get(_key(setting))
        if other is None:
            continue
        for quantity in COMPARED:
            one, two = setting.numbers[quantity], other.numbers[quantity]
            if one and two is not None:
                found.append(
                    PredictionError(
                        setting=setting,
                        predicted_cell=other.cells[0]["index"],
                        quantity=quantity,
                        measured=one,
                        predicted=two,
                    )
                )
    return found


def predictions(errors: Sequence[PredictionError]) -> list[Markup]:
    """Say how far predicted peaks are from measured ones."""
    peaks = [e for e in errors if e.quantity == "peak_allocated_bytes"]
    if not peaks:
        return []
    sizes = [abs(each.error) for each in peaks]
    worst = max(peaks, key=lambda each: abs(each.error))
    return [
        Markup(
            "Predicted peaks are off the measured ones by <b>{:.3f} %</b>, the median "
            "of {} settings that ran on the GPU too; the worst is {:+.2f} %, "
            "<code>{}</code> on {}."
        ).format(
            100 * statistics.median(sizes),
            len(peaks),
            100 * worst.error,
            worst.setting.name,
            worst.setting.workload.title,
        )
    ]


def _key(setting: Setting) -> tuple[Any, ...]:
    fields = setting.workload.fields
    cell = setting.cells[0]
    same = tuple(fields[name] for name in WORKLOAD if name != "device")
    return cell["device_name"], *same, setting.method, *setting.options.values()
