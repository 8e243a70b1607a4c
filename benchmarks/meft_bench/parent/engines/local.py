"""Run the cells of a run in the slots of this machine.

A slot is a thread that starts one child at a time and waits for it. An engine is
independent of sweeps and files: it takes cells and the function that runs one, and
yields the records as cells end.

A slot must outlive the children it starts: on Linux the signal that ends a child with
its parent is tied to the thread that started it.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Record


class Stopped(Exception):
    """Raised if the run was stopped while a cell ran: there is no ending to record."""


def run_cells(
    cells: Iterable[Cell], run_one: Callable[[Cell], Record], num_slots: int
) -> Generator[Record, None, None]:
    """Run every cell, `num_slots` at a time, in order of their start.

    Args:
        cells: the cells to run.
        run_one: runs a cell to its end in the calling thread. Once it raises `Stopped`
            it must do so at once for all cells, and the generator ends when the records
            already made have been yielded.
        num_slots: number of cells that run in parallel.

    Yields:
        Records in the order in which their cells end.
    """
    with ThreadPoolExecutor(num_slots, thread_name_prefix="slot") as slots:
        futures = [slots.submit(run_one, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                try:
                    record = future.result()
                except Stopped:
                    continue
                yield record
        finally:
            for future in futures:
                future.cancel()
