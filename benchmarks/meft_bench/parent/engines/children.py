"""How the children of a run are started, by the device of each."""

from pathlib import Path
from typing import Self

from meft_bench.parent.engines import child_process, forks, isolate
from meft_bench.shared.options import ChildOptions


class Children:
    """Start children as forks of one process where that is possible.

    Args:
        options: options of the children.
        folder: folder of the logs.
        worker_module: module that runs as the child.
        fresh: whether each child has an interpreter of its own, and is no fork.
    """

    def __init__(
        self,
        options: ChildOptions,
        folder: Path,
        worker_module: str,
        *,
        fresh: bool = False,
    ) -> None:
        self._server = None
        if not fresh and forks.is_available():
            variables = isolate.child_environment(options, "cpu")
            log = folder / "imports.log"
            self._server = forks.ForkServer(variables, log, worker_module)

    def starter(self, device: str, ranks: int = 1) -> isolate.StartChild:
        """Return what starts a child.

        Args:
            device: its device, `cpu` or any other.
            ranks: number of processes that train together, which are never forks.
        """
        if self._server is None or device == "cuda" or ranks > 1:
            return child_process.run
        return self._server.run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.close()
