"""What the cells of a run have in common, wherever they run: plain data and a method.

An engine gives it a cell and what belongs to a place: the environment there, a folder
for logs, and how children are started.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meft_bench.parent.engines import child_process, isolate
from meft_bench.shared import request
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.own import Own
from meft_bench.shared.record import Environment, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The definition of a run, without its cells."""

    sweep: str
    question: str
    caveats: tuple[str, ...]
    options: ChildOptions
    timeout_seconds: float
    own: Mapping[str, Own] = field(default_factory=dict)
    """Methods, backbones and tasks of the user, by what cells hold."""
    saves: Mapping[Cell, Path] = field(default_factory=dict)
    """Folders that get the trained model of some cells."""
    worker_module: str = request.WORKER
    """Module that runs as the child."""
    gpu_bytes: Mapping[Cell, Mapping[str, int]] | None = None
    """What cells take of a GPU, by its model, if they may share one; else None.

    A cell that is not among them has a GPU for itself.
    """

    def run(
        self,
        cell: Cell,
        *,
        environment: Environment,
        folder: Path,
        stop: threading.Event,
        start_child: isolate.StartChild = child_process.run,
        gpu: str = "",
    ) -> Record:
        """Run one cell on this machine and return its record.

        Args:
            cell: the cell to run.
            environment: the environment here.
            folder: existing folder for the log.
            stop: when set, the child is killed and `Stopped` is raised.
            start_child: runs a command to its end.
            gpu: UUID of the GPU that the child sees; "" leaves it those of this
                process.

        Raises:
            Stopped, OSError: see `isolate.run`.
        """
        return isolate.run(
            cell,
            sweep=self.sweep,
            question=self.question,
            caveats=self.caveats,
            environment=environment,
            options=self.options,
            timeout_seconds=self.timeout_seconds,
            folder=folder,
            stop=stop,
            own=self.own,
            worker_module=self.worker_module,
            start_child=start_child,
            save_to=self.saves.get(cell),
            gpu=gpu,
        )
