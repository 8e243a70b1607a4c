"""Records of cells that shared their GPU, with other cells or with strangers.

The former were packed (`--pack`), the latter make a record `contaminated`.

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


def leave_out_shared(record: dict[str, Any]) -> bool:
    """Remove the numbers of a record that depend on other processes on its GPU.

    Args:
        record: a valid record, which is changed.

    Returns:
        Whether there were some.
    """
    measurement = record["measurement"]
    is_packed = bool(record["environment"].get("is_gpu_shared"))
    if not is_packed and not is_contaminated(measurement):
        return False
    had = any(measurement.get(name) is not None for name in SHARED)
    measurement |= dict.fromkeys(SHARED)
    return had
