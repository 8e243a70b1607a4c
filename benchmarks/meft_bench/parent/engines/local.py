"""The cells of a run, over the slots of this machine.

A slot is a thread that starts one child at a time and waits for it. An engine knows
neither sweeps nor files: it is given cells and the function that runs one, and yields
the records as they come.

A slot outlives the children it starts, as it must: on Linux the signal that ends a
child with its parent is tied to the thread that started it.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Record


class Stopped(Exception):
    """The run was stopped while a cell ran: there is no ending to record."""


def run_cells(
    cells: Iterable[Cell], run_one: Callable[[Cell], Record], num_slots: int
) -> Generator[Record, None, None]:
    """Run every cell, `num_slots` at a time, in order of their start.

    Args:
        cells: what to run.
        run_one: runs a cell to its end in the calling thread. Once it raises
            `Stopped` it must do so at once for all cells, and the generator ends when
            the records already made have been yielded.
        num_slots: cells that run side by side.

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
