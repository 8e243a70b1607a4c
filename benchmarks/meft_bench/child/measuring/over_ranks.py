"""The bytes of a cell of several ranks: of the rank with the most, and of all together.

Each rank measures itself. Peaks of different ranks need not be at the same time.
"""

from typing import Any

from torch import distributed

from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import BYTES_OF_RANKS


def merge(cell: Cell, partial: PartialResult) -> None:
    """Put the largest of all ranks, and the sums, in the place of a rank's bytes.

    What the peak consists of is that of the rank with the largest peak.

    Args:
        cell: the cell, whose ranks all call this.
        partial: the partial result to update.
    """
    if cell.ranks == 1:
        return
    every: list[Any] = [None] * cell.ranks
    mine = (partial.measurement.to_json(), partial.memory_breakdown)
    distributed.all_gather_object(every, mine)
    bytes_of = {
        name: [numbers[name] for numbers, _ in every]
        for name in BYTES_OF_RANKS
        if all(numbers[name] is not None for numbers, _ in every)
    }
    peaks = bytes_of["peak_allocated_bytes"]
    partial.note(
        **{name: max(values) for name, values in bytes_of.items()},
        sum_peak_allocated_bytes=sum(peaks),
    )
    if saved := bytes_of.get("saved_bytes"):
        partial.note(sum_saved_bytes=sum(saved))
    _, partial.memory_breakdown = every[peaks.index(max(peaks))]
