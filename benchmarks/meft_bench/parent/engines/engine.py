"""What an engine is: a place where the cells of a run can run."""

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from meft_bench.parent.engines.job import Job
from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Environment, Record


class Engine(Protocol):
    """Take cells and the definition of a run, and yield records as cells end."""

    @property
    def places(self) -> Sequence[Mapping[str, Environment]]:
        """Environments by device, one mapping for each class of machine.

        A cell that was done on any of them need not run again.
        """

    def run_cells(
        self,
        cells: Iterable[Cell],
        job: Job,
        *,
        folder: Path,
        started: Callable[[Cell], None],
        stop: threading.Event,
    ) -> Generator[Record, None, None]:
        """Run every cell.

        Args:
            cells: the cells to run.
            job: the run.
            folder: existing folder of the logs.
            started: called with each cell that begins; from any thread.
            stop: when set, all cells end without a record.

        Yields:
            Records in the order in which their cells end.
        """
