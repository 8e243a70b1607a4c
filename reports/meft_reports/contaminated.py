"""Records of cells that shared their GPU with processes of others (`contaminated`).

Their memory by torch, their bytes by ledgers and their scores are valid. Their times,
and what NVML measures of the GPU as a whole (columns that `measurements.toml` calls
`shared`), are those of all processes together: they are left out where records are
read, so that no table, figure or check compares them. The files keep them.
"""

from typing import Any

from meft_reports.columns.measurement import MEASUREMENT
from meft_reports.format import is_null

NUM_FOREIGN = "num_foreign_processes"
SHARED = tuple(column.name for column in MEASUREMENT if column.is_shared)
"""Columns that other processes on the same GPU change."""
ADVICE = "another process was on the GPU; run the cell again on a free one with --force"


def is_contaminated(measurement: Any) -> bool:
    """Return whether other processes used the GPU of a cell.

    Args:
        measurement: measurement of a record, or a row of the frame.
    """
    number = measurement.get(NUM_FOREIGN)
    # In a frame, an unknown number is NA, which is neither true nor false.
    return not is_null(number) and bool(number > 0)


def leave_out_shared(measurement: dict[str, Any]) -> None:
    """Remove the numbers of a contaminated record that depend on other processes.

    Args:
        measurement: measurement of a valid record, which is changed.
    """
    if is_contaminated(measurement):
        measurement |= dict.fromkeys(SHARED)
