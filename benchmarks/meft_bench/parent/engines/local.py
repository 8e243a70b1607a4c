"""Run the cells of a run in the slots of this machine, and on all of its GPUs.

A slot is a thread that starts one child at a time and waits for it. It must outlive
the children it starts: on Linux the signal that ends a child with its parent is tied to
the thread that started it.

A cell of a real GPU has the GPU on which the fewest cells run, or one with room for it
where cells are packed; one for each of its ranks, and sees no other.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from meft_bench.parent.engines import environment
from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.children import Children
from meft_bench.parent.engines.gpus import Gpus, Share
from meft_bench.parent.engines.job import Job
from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Environment, Record


class Local:
    """The machine of this process.

    Args:
        devices: the devices of the cells.
        num_threads: number of threads each child may use.
        num_slots: number of cells that run in parallel.
        fresh: whether each child has an interpreter of its own, and is no fork.
    """

    def __init__(
        self, devices: Iterable[str], num_threads: int, num_slots: int, *, fresh: bool
    ) -> None:
        self._num_slots = num_slots
        self._fresh = fresh
        self._gpus = Gpus(environment.gpus())
        self._by_device = {
            device: environment.collect(
                num_threads=num_threads, num_slots=num_slots, device=device
            )
            for device in sorted(set(devices))
        }

    @property
    def places(self) -> Sequence[Mapping[str, Environment]]:
        """See `Engine`: one for each model of GPU."""
        models = dict.fromkeys(self._gpus.models) or {"": None}
        return [
            {
                device: _on(where, device, model)
                for device, where in self._by_device.items()
            }
            for model in models
        ]

    def run_cells(
        self,
        cells: Iterable[Cell],
        job: Job,
        *,
        folder: Path,
        started: Callable[[Cell], None],
        stop: threading.Event,
    ) -> Generator[Record, None, None]:
        """See `Engine`.

        Raises:
            OSError: a log cannot be written, or no child can be started.
        """

        def run_one(cell: Cell, children: Children) -> Record:
            try:
                with self._share_of(cell, job, stop) as share:
                    started(cell)
                    where = self._by_device[cell.device]
                    record = job.run(
                        cell,
                        environment=_on(where, cell.device, share.model),
                        folder=folder,
                        stop=stop,
                        start_child=children.starter(cell.device, cell.ranks),
                        gpu=self._gpus.uuids_of(share),
                    )
                    return _shared(record) if share.is_shared else record
            except OSError:
                stop.set()  # else the run waits for the other slots
                raise

        with Children(
            job.options, folder, job.worker_module, fresh=self._fresh
        ) as children:
            yield from in_slots(
                cells, lambda cell: run_one(cell, children), self._num_slots
            )

    def _share_of(
        self, cell: Cell, job: Job, stop: threading.Event
    ) -> contextlib.AbstractContextManager[Share]:
        if job.gpu_bytes is None or cell.device != "cuda":
            return self._gpus.some(cell.device, cell.ranks)
        needs = job.gpu_bytes.get(cell, {}) if cell.ranks == 1 else {}
        return self._gpus.with_room(needs, stop, cell.ranks)


def _shared(record: Record) -> Record:
    """Return the record of a cell that was not alone on its GPU."""
    where = dataclasses.replace(record.environment, is_gpu_shared=True)
    return dataclasses.replace(record, environment=where)


def _on(where: Environment, device: str, model: str) -> Environment:
    """Return the environment of cells on a GPU of a model, else the one given."""
    if device != "cuda" or not model:
        return where
    return dataclasses.replace(where, machine=model)


def in_slots(
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
