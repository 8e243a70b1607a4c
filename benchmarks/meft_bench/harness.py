"""A run: the cells of a sweep that are not done yet, into the records file.

Interrupted at any moment, even by `kill -9`, it leaves a file of whole records; the
same command then goes on with the cells that are not in it. A first SIGINT or SIGTERM
ends the children and the run, a second one ends the process as it would any other.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from meft_bench import environment, isolate, runs
from meft_bench.cell import Cell
from meft_bench.engines import local
from meft_bench.options import ChildOptions
from meft_bench.progress import Progress, count
from meft_bench.record import Environment, Record, Status
from meft_bench.runs import RecordsFile

EXIT_OK = 0
EXIT_FAILED = 4
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything one run is told."""

    sweep: str
    cells: tuple[Cell, ...]
    path: Path
    """The records file."""
    options: ChildOptions
    num_slots: int
    timeout_seconds: float
    force: bool
    """Run cells that are done, too."""


def run(plan: Plan, *, worker_module: str = isolate.WORKER) -> int:
    """Run what is left of a plan, tell how it went, and return the exit code.

    Raises:
        runs.RunsError: the records file cannot be used.
    """
    environments = environments_for(
        plan.cells, num_threads=plan.options.num_threads, num_slots=plan.num_slots
    )
    with RecordsFile(plan.path) as file:
        done = (
            set() if plan.force else runs.done(file.records, plan.cells, environments)
        )
        left = [cell for cell in plan.cells if cell not in done]
        ended = _run_left(plan, left, environments, file, worker_module)
    print(count([*(Status.OK for _ in done), *(record.status for record in ended)]))
    if len(ended) < len(left):
        print(
            f"interrupted: {len(done) + len(ended)} of {len(plan.cells)} cells are "
            f"recorded in {plan.path}; run the same command again to go on",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    page = plan.path.with_suffix(".html")
    print(f"records: {plan.path}")
    print(f"page:    meft-report page {plan.path} -o {page}")
    fine = all(record.status in (Status.OK, Status.SKIPPED) for record in ended)
    return EXIT_OK if fine else EXIT_FAILED


def environments_for(
    cells: tuple[Cell, ...], *, num_threads: int, num_slots: int
) -> dict[str, Environment]:
    """The environment of each device that the cells run on."""
    return {
        device: environment.collect(
            num_threads=num_threads, num_slots=num_slots, device=device
        )
        for device in sorted({cell.device for cell in cells})
    }


def _run_left(
    plan: Plan,
    left: list[Cell],
    environments: dict[str, Environment],
    file: RecordsFile,
    worker_module: str,
) -> list[Record]:
    """The records of the cells that ended; all of them, unless the run was stopped."""
    stop = threading.Event()
    folder = plan.path.with_suffix(".logs")
    folder.mkdir(exist_ok=True)
    ended = []
    with Progress(
        num_cells=len(plan.cells),
        num_done=len(plan.cells) - len(left),
        logs=folder,
        stream=sys.stderr,
    ) as progress:

        def run_one(cell: Cell) -> Record:
            progress.started(cell)
            return isolate.run(
                cell,
                sweep=plan.sweep,
                environment=environments[cell.device],
                options=plan.options,
                timeout_seconds=plan.timeout_seconds,
                folder=folder,
                stop=stop,
                worker_module=worker_module,
            )

        records = local.run_cells(left, run_one, plan.num_slots)
        with contextlib.closing(records), _stopping(stop):
            for record in records:
                file.append(record)
                progress.ended(record)
                ended.append(record)
    return ended


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on the first SIGINT or SIGTERM, and at the end of the block."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # Restored first: `Event.set` must not be entered again while it runs.
        restore()
        stop.set()

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()
        stop.set()
