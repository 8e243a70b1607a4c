"""Run the cells of a run on a Ray cluster, one task for each.

A task runs on any node with enough free cores, and a free GPU where the cell needs one.
It runs its cell as the machine of the driver would, in a new process, so that nothing
of one cell reaches the next, and returns the record. Ray starts a task again, elsewhere
if need be, whose node or worker is lost before its record arrived; no cell has two
records.

The cluster is the one that `RAY_ADDRESS` names, or that `ray start` has started on this
machine, or else a new one of this machine alone. Its nodes need the same versions of
`meft` and other packages, and data, weights and files of the user in the same places.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from meft_bench.parent.engines import environment, isolate
from meft_bench.parent.engines.job import Job
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Environment, Record, Status

MOST_PENDING = 1000
"""Tasks that are submitted at a time; others wait here, and take no memory of Ray."""
NUM_RETRIES = 5
"""How often a task starts again whose node or worker was lost."""
LOG_BYTES = 1 << 16
"""The last bytes of a log that come back from another machine."""
_WAIT_SECONDS = 0.2
_CONNECT_SECONDS = 10.0


class ClusterError(Exception):
    """Raised if a cluster cannot run the cells; says why, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine of a cluster, as it describes itself."""

    address: str
    environments: dict[str, Environment]
    """By device."""
    num_cpus: int
    num_gpus: int
    sees_data: bool
    """Whether the directory of data exists there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a task returns."""

    record: Record
    log: bytes | None
    """The end of the child's log; None if the driver sees the file itself."""


class RayCluster:
    """A Ray cluster, as long as the block of its `with` runs.

    Args:
        devices: the devices of the cells, with the most ranks of one on each.
        job: the run.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers; a node has other code
            or other packages, or lacks the data; or no node has what a cell needs.
    """

    def __init__(self, devices: Mapping[str, int], job: Job) -> None:
        self._devices = devices
        self._job = job
        self._nodes: list[Node] = []

    def __enter__(self) -> Self:
        _connect()
        try:
            self._nodes = _look_at_nodes(self._devices, self._job)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    @property
    def places(self) -> Sequence[Mapping[str, Environment]]:
        """See `Engine`: one for each node."""
        return [node.environments for node in self._nodes]

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
            ClusterError: a node that has joined since has other code, or a node can
                write no log.
        """
        import ray

        code_sha256 = environment.digest(environment.source_folders())
        left = iter(cells)
        pending: dict[Any, Cell] = {}
        with _mark_in(folder) as mark:
            try:
                while not stop.is_set():
                    while len(pending) < MOST_PENDING and (cell := next(left, None)):
                        task = _task(cell, job)
                        reference = task.remote(cell, job, str(mark), code_sha256)
                        pending[reference] = cell
                        started(cell)
                    if not pending:
                        return
                    ended, _ = ray.wait([*pending], timeout=_WAIT_SECONDS)
                    for reference in ended:
                        cell = pending.pop(reference)
                        yield _record_of(reference, cell, job, folder)
            finally:
                for reference in pending:
                    with contextlib.suppress(Exception):  # it may have ended
                        ray.cancel(reference, force=True)


def _connect() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("engine ray needs Ray: `python -m pip install 'meft[ray]'`")
    # Else Ray would report to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return
    where = os.environ.get("RAY_ADDRESS", "")
    _require_answer(where)
    try:
        ray.init(
            include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(
            f"no Ray cluster at {where or 'this machine'}: {reason}. A cluster that "
            "asks for a token: copy ~/.ray/auth_token of its head to this machine"
        ) from error


def _require_answer(address: str) -> None:
    """Raise `ClusterError` if nothing listens at `HOST:PORT`.

    Ray itself would try for minutes.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}; "
            "start one with `ray start --head`, or unset the variable"
        ) from error


def _look_at_nodes(devices: Mapping[str, int], job: Job) -> list[Node]:
    """Return the nodes, after checking that they can run the cells."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    found: list[Node] = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task: Any = look.options(scheduling_strategy=strategy)
        arguments = (
            node["NodeManagerAddress"],
            node["Resources"],
            sorted(devices),
            job,
        )
        with contextlib.suppress(RayError):  # the node has just been lost
            found.append(_get(task.remote(*arguments)))
    _check(found, devices, job)
    return found


def _task(cell: Cell, job: Job) -> Any:
    """Return the task of a cell: what it takes of a node, and when it starts again."""
    import ray

    num_cpus = job.options.num_threads * cell.ranks
    needs = {"num_cpus": num_cpus, "max_retries": NUM_RETRIES}
    if cell.device == "cuda":
        # A worker that had a GPU ends, and lets go of what it may have opened.
        needs |= {"num_gpus": cell.ranks, "max_calls": 1}
    return ray.remote(**needs)(_run_there).options(name=cell.id)


def _record_of(reference: Any, cell: Cell, job: Job, folder: Path) -> Record:
    """Return the record of a task that ended, and keep its log next to the others."""
    from ray.exceptions import LocalRayletDiedError, RayError

    path = isolate.log_path(folder, cell)
    try:
        answer: Answer = _get(reference)
    except LocalRayletDiedError as error:
        raise ClusterError(
            "the node of this process has left the Ray cluster; connect to another one "
            "and run the same command again to go on"
        ) from error
    except RayError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        path.write_text(reason, encoding="utf-8")
        return _lost(cell, job, reason)
    if answer.log is not None:
        path.write_bytes(answer.log)
    return answer.record


def _get(reference: Any) -> Any:
    """Return the result of a task.

    Raises:
        ClusterError: the task raised an error, of which no other node knows better.
        ray.exceptions.RayError: the task was lost.
    """
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ClusterError):
            raise ClusterError(str(cause)) from error
        reason = " ".join(str(cause).split())
        raise ClusterError(
            f"a node of the Ray cluster failed: {type(cause).__name__}: {reason}"
        ) from error


def _lost(cell: Cell, job: Job, reason: str) -> Record:
    """Return the record of a cell whose workers were lost again and again."""
    here = environment.collect(
        num_threads=job.options.num_threads, num_slots=1, device="cpu"
    )
    return Record(
        sweep=job.sweep,
        cell=cell,
        status=Status.KILLED,
        message=f"its node or worker was lost {NUM_RETRIES + 1} times: {reason}"[:500],
        started_at=isolate.now(),
        wall_seconds=0.0,
        measurement=Measurement(),
        environment=dataclasses.replace(here, machine="unknown: lost"),
        sweep_question=job.question,
        sweep_caveats="\n".join(job.caveats),
    )


def _check(nodes: Sequence[Node], devices: Mapping[str, int], job: Job) -> None:
    here = environment.collect(num_threads=1, num_slots=1, device="cpu")
    for node in nodes:
        for its in node.environments.values():
            if its.code_sha256 != here.code_sha256:
                raise ClusterError(_other_code(node.address))
            if its.versions != here.versions:
                raise ClusterError(
                    f"node {node.address} has other packages: "
                    f"{_difference(here.versions, its.versions)}; install the same on "
                    "all nodes"
                )
        if not node.sees_data:
            raise ClusterError(
                f"node {node.address} has no directory {job.options.data_dir!r}: put "
                "the data there, or on a file system that all nodes share"
            )
    most = max((node.num_cpus for node in nodes), default=0)
    ranks = max(devices.values(), default=1)
    if job.options.num_threads * ranks > most:
        remedy = f"give `--threads {most // ranks}` or less"
        raise ClusterError(
            f"a cell takes {job.options.num_threads * ranks} cores and the largest "
            f"node of the Ray cluster has {most}: "
            f"{remedy if most >= ranks else f'lower `ranks` = {ranks}'}"
        )
    if "cuda" in devices and not any(node.num_gpus for node in nodes):
        raise ClusterError("device cuda: no node of the Ray cluster has a GPU")
    gpus, cores = devices.get("cuda", 0), job.options.num_threads * ranks
    # Ray would wait for such a node without end.
    if gpus > 1 and not any(n.num_gpus >= gpus and n.num_cpus >= cores for n in nodes):
        raise ClusterError(
            f"a cell of `ranks` = {gpus} takes {gpus} GPUs and {cores} cores of one "
            "node, and no node of the Ray cluster has both: lower `ranks`, or "
            "`--threads`"
        )


def _difference(mine: dict[str, str], its: dict[str, str]) -> str:
    names = [n for n in {*mine, *its} if mine.get(n) != its.get(n)]
    shown = (
        f"{name} {its.get(name, 'missing')} (here {mine.get(name, 'missing')})"
        for name in sorted(names)
    )
    return ", ".join(shown)


def _other_code(address: str) -> str:
    return (
        f"node {address} has another version of meft than this machine: install the "
        "same on all nodes"
    )


@contextlib.contextmanager
def _mark_in(folder: Path) -> Iterator[Path]:
    """Put a file into a folder by which nodes tell whether they see the folder."""
    mark = folder.resolve() / f".{uuid.uuid4().hex}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


# What runs on the nodes.


def _look(
    address: str, resources: dict[str, float], devices: Sequence[str], job: Job
) -> Node:
    data = job.options.data_dir
    return Node(
        address=address,
        environments={
            device: _environment(device, job.options.num_threads, 1)
            for device in devices
        },
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        sees_data=data is None or Path(data).is_dir(),
    )


def _run_there(cell: Cell, job: Job, mark: str, code_sha256: str) -> Answer:
    """Run a cell on this node; the function of the tasks."""
    import ray

    threads = job.options.num_threads
    where = _environment(cell.device, threads, _num_slots(cell, threads))
    if where.code_sha256 != code_sha256:
        raise ClusterError(_other_code(ray.util.get_node_ip_address()))
    if Path(mark).exists():
        record = job.run(
            cell,
            environment=where,
            folder=Path(mark).parent,
            stop=threading.Event(),
        )
        return Answer(record=record, log=None)
    folder_of_models = job.saves.get(cell)
    if folder_of_models is not None:
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()} does not see "
            f"{str(folder_of_models)!r}, where a trained backbone goes: put the "
            "records file on a file system that all nodes share"
        )
    with tempfile.TemporaryDirectory(prefix="meft-bench-") as name:
        record = job.run(
            cell, environment=where, folder=Path(name), stop=threading.Event()
        )
        log = isolate.log_path(Path(name), cell).read_bytes()[-LOG_BYTES:]
    return Answer(record=record, log=log)


def _num_slots(cell: Cell, num_threads: int) -> int:
    """Return how many such cells this node runs side by side."""
    import ray

    name = ray.get_runtime_context().get_node_id()
    found = next(node for node in ray.nodes() if node["NodeID"] == name)
    resources = found["Resources"]
    by_cores = int(resources.get("CPU", 1)) // (num_threads * cell.ranks)
    num_gpus = int(resources.get("GPU", 0)) // cell.ranks
    by_gpus = num_gpus if cell.device == "cuda" else by_cores
    return max(1, min(by_cores, by_gpus))


@functools.cache
def _environment(device: str, num_threads: int, num_slots: int) -> Environment:
    return environment.collect(
        num_threads=num_threads, num_slots=num_slots, device=device
    )
