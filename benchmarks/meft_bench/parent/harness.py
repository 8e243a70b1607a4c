"""A run: measure the cells of a sweep that are not done yet, and append records.

If interrupted at any time, even by `kill -9`, it leaves a file of complete records; the
same command then continues with the cells that are not in it. A first SIGINT or SIGTERM
ends the children and the run, a second one has its default effect.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from meft_bench.parent import checks, output, runs, trained, trials
from meft_bench.parent.engines import environment, packing
from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.children import Children
from meft_bench.parent.engines.engine import Engine
from meft_bench.parent.engines.job import Job
from meft_bench.parent.engines.local import Local
from meft_bench.parent.progress import Progress, count
from meft_bench.parent.runs import RecordsFile
from meft_bench.parent.trials import Tuning
from meft_bench.shared import request
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.own import Own
from meft_bench.shared.record import Environment, Record, Status

EXIT_OK = 0
EXIT_NOTHING = 3
EXIT_FAILED = 4
EXIT_INTERRUPTED = 130

NUM_NAMED = 3
"""Number of cells that are named where several share a reason."""
NUM_REASONS = 10
"""Number of reasons that are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """The complete definition of one run."""

    sweep: str
    question: str
    caveats: tuple[str, ...]
    cells: tuple[Cell, ...]
    path: Path
    """The records file."""
    options: ChildOptions
    num_slots: int
    timeout_seconds: float
    force: bool
    """Whether cells that are done are run again."""
    fresh: bool = False
    """Whether each cell has an interpreter of its own, and is no fork of one process.

    Cells on a real GPU always have one.
    """
    tunings: tuple[Tuning, ...] = ()
    """Trials, with the cells that wait for them."""
    trainings: Mapping[str, Cell] = field(default_factory=dict)
    """Cells that train backbones of others, by what the others hold."""
    saves: Mapping[Cell, Path] = field(default_factory=dict)
    """Folders that get the trained model of some cells."""
    left_out: tuple[str, ...] = ()
    """What the sweep declares and this run omits, one readable line each."""
    checks: tuple[str, ...] = ()
    """Programs of `registry.CHECKS` to run before the cells."""
    pack: bool = False
    """Whether cells share a GPU that has room for all of them by prediction."""
    engine: str = "local"
    """Where cells run, one of `engines.NAMES`."""
    check_device: str = "cuda"
    """The device of the checks."""
    own: Mapping[str, Own] = field(default_factory=dict)
    """Methods, backbones and tasks of the user, by what cells hold."""
    time_budget_seconds: float | None = None
    """Time after which the run ends with the cells done so far; None means no limit."""


def run(plan: RunPlan, *, worker_module: str = request.WORKER) -> int:
    """Run the remaining cells of a plan, print a summary, and return the exit code.

    Cells that train a backbone run before all others, and those that wait for trials
    after them.

    Args:
        plan: the run.
        worker_module: module that runs as the child.

    Raises:
        runs.RunsError: the records file, or a log next to it, cannot be used.
    """
    budget = Budget(plan.time_budget_seconds)
    if not plan.cells and not plan.tunings:
        return _run_checks_alone(plan, budget)
    order = _in_order(plan)
    with RecordsFile(plan.path) as file:
        try:
            ended = _run_in_order(order, file, budget, worker_module)
        except Stopped:
            return _interrupted(order.plan, order.num_cells, [])
        except OSError as error:
            raise runs.unusable(plan.path, error) from error
    return _summarize(order, ended, budget)


class Order(NamedTuple):
    """The cells of a plan, by when they can run."""

    plan: RunPlan
    """The run, with the folders of the backbones that it trains."""
    before: RunPlan
    """Cells that train the backbones of others."""
    first: RunPlan
    """Those that wait for no trial, and the trials."""
    num_cells: int
    """Number of all cells, with those that wait for trials."""


class Stage(NamedTuple):
    """How cells ended that ran without waiting for each other."""

    statuses: list[Status]
    is_whole: bool
    """Whether all of them ended, and none was stopped."""

    def then(self, later: "Stage") -> "Stage":
        """Return how the cells of both stages ended."""
        return Stage([*self.statuses, *later.statuses], later.is_whole)


class Ended(NamedTuple):
    """How the cells of a run ended."""

    stage: Stage
    checked: Sequence[Status]
    """Of the checks that ran."""
    unscored: Sequence[Tuning]
    """Trials of which none has a score."""
    untrained: Sequence[Cell]
    """Cells whose backbone was not trained."""
    num_further: int
    """Number of trials of values beyond those declared."""


def _in_order(plan: RunPlan) -> Order:
    tried = tuple(trial for tuning in plan.tunings for trial in tuning.trials)
    num_waiting = sum(len(tuning.cells) for tuning in plan.tunings)
    own, saves = trained.with_folders(plan.own, plan.trainings, plan.path)
    plan = dataclasses.replace(plan, own=own, saves=saves)
    others = tuple(cell for cell in (*plan.cells, *tried) if cell not in saves)
    return Order(
        plan=plan,
        before=dataclasses.replace(plan, cells=(*saves,), left_out=()),
        first=dataclasses.replace(plan, cells=others),
        num_cells=len(saves) + len(others) + num_waiting,
    )


def _run_in_order(
    order: Order, file: RecordsFile, budget: "Budget", worker_module: str
) -> Ended:
    """Run the checks of a plan, and then its cells that are not done.

    Raises:
        Stopped: the run was interrupted during its checks.
    """
    plan, first = order.plan, order.first
    checked = _run_checks(plan, budget)
    job = _job(plan, worker_module)
    stage = Stage([], is_whole=True)
    prepared: dict[Cell, Record] = {}
    untrained: list[Cell] = []
    unscored: list[Tuning] = []
    with _engine(plan, (*order.before.cells, *first.cells), job) as engine:
        if order.before.cells and _is_left(plan, first, file, engine):
            stage = _run_stage(order.before, job, engine, file, budget)
            prepared = _done(order.before, file, engine, again=False)
            first, untrained = _with_backbones(first, prepared)
        if stage.is_whole:
            stage = stage.then(_run_stage(first, job, engine, file, budget))
        if stage.is_whole and plan.tunings:
            plan, stage = _with_further_trials(
                plan, stage, prepared, job, engine, file, budget
            )
        if stage.is_whole and plan.tunings:
            second, unscored = _after_trials(plan, prepared, file, engine)
            if second.cells:
                stage = stage.then(_run_stage(second, job, engine, file, budget))
    num_further = _num_trials(plan) - _num_trials(order.plan)
    return Ended(stage, checked, unscored, untrained, num_further)


def _num_trials(plan: RunPlan) -> int:
    return sum(len(tuning.trials) for tuning in plan.tunings)


def _with_further_trials(
    plan: RunPlan,
    stage: Stage,
    prepared: Mapping[Cell, Record],
    job: Job,
    engine: Engine,
    file: RecordsFile,
    budget: "Budget",
) -> tuple[RunPlan, Stage]:
    """Run trials of values beyond those declared, and return the plan with them.

    Args:
        plan: the run, whose declared trials have ended.
        stage: how its cells have ended so far.
        prepared: the cells that have trained a backbone.
        job: what all cells have in common.
        engine: where cells run.
        file: the records.
        budget: the time limit of the run.
    """
    ran = {trial for tuning in plan.tunings for trial in tuning.trials}
    while stage.is_whole:
        tunings = _grown(plan.tunings, file, engine, ran if plan.force else None)
        plan = dataclasses.replace(plan, tunings=tunings)
        every = [trial for tuning in tunings for trial in tuning.trials]
        further = tuple(trial for trial in every if trial not in ran)
        if not further:
            break
        ran.update(further)
        part = dataclasses.replace(plan, cells=further, left_out=())
        if prepared:
            part, _ = _with_backbones(part, prepared)
        stage = stage.then(_run_stage(part, job, engine, file, budget))
    return plan, stage


def _grown(
    tunings: Sequence[Tuning],
    file: RecordsFile,
    engine: Engine,
    ran: Collection[Cell] | None = None,
) -> tuple[Tuning, ...]:
    """Return tunings with the further values that the records ask for.

    Args:
        tunings: the tunings of a sweep.
        file: the records.
        engine: where cells run.
        ran: the trials of which records count; None for all.
    """

    def find(cells: Sequence[Cell]) -> dict[Cell, Record]:
        wanted = [cell for cell in cells if ran is None or cell in ran]
        found: dict[Cell, Record] = {}
        for environments in engine.places:
            found = runs.ended(file.records, wanted, environments) | found
        return found

    return trials.grown(tunings, find)


def _after_trials(
    plan: RunPlan,
    prepared: Mapping[Cell, Record],
    file: RecordsFile,
    engine: Engine,
) -> tuple[RunPlan, list[Tuning]]:
    """Return the plan of the cells that waited for trials, and trials without a score.

    Args:
        plan: the run.
        prepared: the cells that have trained a backbone.
        file: the records.
        engine: where cells run.
    """
    tried = [trial for tuning in plan.tunings for trial in tuning.trials]
    cells, unscored = _chosen(plan.tunings, _done_among(tried, file, engine))
    second = dataclasses.replace(plan, cells=cells, left_out=())
    if prepared:
        second, _ = _with_backbones(second, prepared)
    return second, unscored


def _summarize(order: Order, ended: Ended, budget: "Budget") -> int:
    """Print how a run ended, and return its exit code."""
    plan, statuses = order.plan, ended.stage.statuses
    num_cells = order.num_cells + ended.num_further
    if not ended.stage.is_whole and budget.is_over:
        output.summarize(
            [
                count(statuses),
                f"the time budget is over: {len(statuses)} of {num_cells} cells "
                f"are recorded in {plan.path}; the same command goes on",
            ]
        )
        return _exit_code([*statuses, *ended.checked])
    if not ended.stage.is_whole:
        return _interrupted(plan, num_cells, statuses)
    for tuning in ended.unscored:
        output.complain(
            f"not run, {len(tuning.cells)} cells, such as {tuning.cells[0].id}: "
            f"none of their {len(tuning.trials)} trials has a score"
        )
    if ended.untrained:
        names = sorted({plan.own[cell.backbone].alias for cell in ended.untrained})
        output.complain(
            f"not run, {len(ended.untrained)} cells: the training of their backbone "
            f"{' and '.join(names)} failed"
        )
    page = plan.path.with_suffix(".html")
    output.summarize(
        [
            count(statuses),
            f"records: {plan.path}",
            f"page:    meft-report page {plan.path} -o {page}",
        ]
    )
    return _exit_code([*statuses, *ended.checked])


def _job(plan: RunPlan, worker_module: str) -> Job:
    return Job(
        sweep=plan.sweep,
        question=plan.question,
        caveats=plan.caveats,
        options=plan.options,
        timeout_seconds=plan.timeout_seconds,
        own=plan.own,
        saves=plan.saves,
        worker_module=worker_module,
    )


@contextlib.contextmanager
def _engine(plan: RunPlan, cells: Sequence[Cell], job: Job) -> Iterator[Engine]:
    """Return where the cells of a plan run, for the block of a `with`."""
    devices = {
        cell.device: max(one.ranks for one in cells if one.device == cell.device)
        for cell in cells
    }
    if plan.engine == "ray":
        from meft_bench.parent.engines.ray_cluster import RayCluster

        with RayCluster(devices, job) as cluster:
            yield cluster
        return
    threads = plan.options.num_threads
    yield Local(devices, threads, plan.num_slots, fresh=plan.fresh)


def _run_stage(
    plan: RunPlan, job: Job, engine: Engine, file: RecordsFile, budget: "Budget"
) -> Stage:
    """Run those of a plan's cells that are not done."""
    done = _done(plan, file, engine)
    left = [cell for cell in plan.cells if cell not in done]
    ended = _run_left(plan, left, done, job, engine, file, budget)
    statuses = [*(Status.OK for _ in done), *(record.status for record in ended)]
    return Stage(statuses, is_whole=len(ended) == len(left))


def _done(
    plan: RunPlan, file: RecordsFile, engine: Engine, *, again: bool | None = None
) -> dict[Cell, Record]:
    """Return the cells that need not run, each with its record.

    Args:
        plan: the run.
        file: the records.
        engine: where cells run.
        again: whether cells that are done run again; None takes it from the plan.
    """
    if plan.force if again is None else again:
        return {}
    done = _done_among(plan.cells, file, engine)
    lost = {
        cell
        for cell, folder in plan.saves.items()
        if cell in done and trained.digest_in(folder) is None
    }
    lost |= trained.on_other_weights(done, plan.trainings, plan.saves)
    return {cell: record for cell, record in done.items() if cell not in lost}


def _is_left(plan: RunPlan, first: RunPlan, file: RecordsFile, engine: Engine) -> bool:
    """Return whether any cell is left for which a backbone has to be trained."""
    done = _done(first, file, engine)
    tunings = _grown(plan.tunings, file, engine)
    tried = tuple(trial for tuning in tunings for trial in tuning.trials)
    done |= _done(dataclasses.replace(plan, cells=tried), file, engine)
    cells, _ = _chosen(tunings, done)
    second = dataclasses.replace(plan, cells=cells)
    done |= _done(second, file, engine)
    every = {*first.cells, *tried, *cells} | ({*plan.saves} & {*plan.cells})
    return plan.force or not every <= done.keys() or (not cells and bool(plan.tunings))


def _done_among(
    cells: Sequence[Cell], file: RecordsFile, engine: Engine
) -> dict[Cell, Record]:
    """Return the cells that are done on any machine of an engine."""
    found: dict[Cell, Record] = {}
    for environments in engine.places:
        found = runs.done(file.records, cells, environments) | found
    return found


def _with_backbones(
    plan: RunPlan, prepared: Mapping[Cell, Record]
) -> tuple[RunPlan, list[Cell]]:
    """Return the plan without cells whose backbone was not trained, and these."""
    missing = {value for value, cell in plan.trainings.items() if cell not in prepared}
    left = [cell for cell in plan.cells if trained.needs(cell, missing)]
    cells = tuple(cell for cell in plan.cells if cell not in left)
    return dataclasses.replace(plan, cells=cells), left


def _chosen(
    tunings: Sequence[Tuning], scored: Mapping[Cell, Record]
) -> tuple[tuple[Cell, ...], list[Tuning]]:
    """Return the cells with the values of the best trials, and tunings without one."""
    cells: dict[Cell, None] = {}
    unscored = []
    for tuning in tunings:
        best = trials.best_of(tuning, scored)
        if best is None:
            unscored.append(tuning)
        else:
            cells |= dict.fromkeys(tuning.cells_with(best))
    return tuple(cells), unscored


class Budget:
    """The time limit of a run.

    Args:
        seconds: time from now on; None means no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds that are left, 0 after the limit."""
        if self._deadline is None:
            return math.inf
        return max(0.0, self._deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self.seconds_left == 0

    @contextlib.contextmanager
    def stopping(self, stop: threading.Event) -> Iterator[None]:
        """Set `stop` when the time is over."""
        if self._deadline is None:
            yield
            return
        seconds = min(self.seconds_left, threading.TIMEOUT_MAX)
        timer = threading.Timer(seconds, stop.set)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _run_checks_alone(plan: RunPlan, budget: Budget) -> int:
    """Run the checks of a sweep that has no cells, and return the exit code."""
    path = checks.path_next_to(plan.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = checks.named(plan.checks, plan.check_device)
    try:
        ended = _run_checks(plan, budget)
    except Stopped:
        output.complain(f"interrupted; run the same command again to go on: {path}")
        return EXIT_INTERRUPTED
    except OSError as error:
        raise runs.unusable(path, error) from error
    lines = [f"{count(ended)} of {len(named)} checks"] if ended else []
    if budget.is_over:
        lines.append("the time budget is over; the same command goes on")
    output.summarize([*lines, f"checks: {path}"])
    done = [Status.OK] if len(ended) < len(named) and not budget.is_over else []
    return _exit_code([*ended, *done])


def _run_checks(plan: RunPlan, budget: Budget) -> list[Status]:
    """Run the checks of a plan that are not done yet, and return their statuses.

    Raises:
        Stopped: the run was interrupted.
    """
    if not plan.checks:
        return []
    path = checks.path_next_to(plan.path)
    logs = plan.path.with_suffix(".logs")
    logs.mkdir(exist_ok=True)
    named = checks.named(plan.checks, plan.check_device)
    with Children(plan.options, logs, request.WORKER, fresh=plan.fresh) as children:
        return _run_named(plan, budget, named, path, logs, children)


def _run_named(
    plan: RunPlan,
    budget: Budget,
    named: Sequence[tuple[str, str]],
    path: Path,
    logs: Path,
    children: Children,
) -> list[Status]:
    ended: list[Status] = []
    for name, device in named:
        where = environment.collect(
            num_threads=plan.options.num_threads,
            num_slots=plan.num_slots,
            device=device,
        )
        done = not plan.force and checks.is_done(path, name, device, where)
        if done or budget.is_over:
            continue
        ends_run = budget.seconds_left < plan.timeout_seconds
        stop = threading.Event()
        with _stopping(stop):
            line = checks.run(
                name,
                device,
                path=path,
                logs=logs,
                environment=where,
                options=plan.options,
                timeout_seconds=min(plan.timeout_seconds, budget.seconds_left),
                ends_run=ends_run,
                stop=stop,
                start_child=children.starter(device),
            )
        if line is None:
            output.complain(f"check {name} on {device}: out of time")
            break
        ended.append(Status(line["status"]))
        words = [f"check {name} on {device}: {line['status']}"]
        words += [str(line["message"])] if line["message"] else []
        words.append(f"{len(line['figures'])} figures")
        output.complain(", ".join(words))
    if ended:
        for text in checks.compare(path):
            output.complain(text)
    return ended


def _interrupted(plan: RunPlan, num_cells: int, statuses: Sequence[Status]) -> int:
    """Say how to continue an interrupted run, and return its exit code.

    Args:
        plan: the run.
        num_cells: number of its cells.
        statuses: those of the recorded cells.
    """
    output.summarize([count(statuses)])
    output.complain(
        f"interrupted: {len(statuses)} of {num_cells} cells are recorded in "
        f"{plan.path}; run the same command again to go on"
    )
    return EXIT_INTERRUPTED


def _exit_code(statuses: Sequence[Status]) -> int:
    if any(status not in (Status.OK, Status.SKIPPED) for status in statuses):
        return EXIT_FAILED
    return EXIT_OK if Status.OK in statuses else EXIT_NOTHING


def environments_for(
    cells: tuple[Cell, ...], *, num_threads: int, num_slots: int
) -> dict[str, Environment]:
    """Return the environment of each device that the cells run on.

    Args:
        cells: the cells of the run.
        num_threads: number of threads each child may use.
        num_slots: number of cells that run in parallel.

    Returns:
        Environments by device.
    """
    return {
        device: environment.collect(
            num_threads=num_threads, num_slots=num_slots, device=device
        )
        for device in sorted({cell.device for cell in cells})
    }


def _run_left(
    plan: RunPlan,
    left: list[Cell],
    done: Mapping[Cell, Record],
    job: Job,
    engine: Engine,
    file: RecordsFile,
    budget: Budget,
) -> list[Record]:
    """Return the records of the cells that ended; all, unless the run was stopped."""
    stop = threading.Event()
    folder = plan.path.with_suffix(".logs")
    folder.mkdir(exist_ok=True)
    ended: list[Record] = []
    with Progress(
        num_cells=len(plan.cells), num_done=len(done), logs=folder, stream=sys.stderr
    ) as progress:
        if file.is_torn:
            progress.tell(f"the last line of {plan.path} is half written: left out")
        if file.is_ahead:
            progress.tell(
                f"a record of {plan.path} started at {file.newest}, after now by the "
                "clock of this machine: records of this run have that time"
            )
        for line in _left_out(plan, done):
            progress.tell(line)

        with _stopping(stop), budget.stopping(stop):
            if plan.pack:
                try:
                    job = _packed(left, job, folder, stop, progress.tell)
                except Stopped:
                    return ended
            records = engine.run_cells(
                left, job, folder=folder, started=progress.started, stop=stop
            )
            with contextlib.closing(records):
                for record in records:
                    file.append(record)
                    progress.ended(record)
                    ended.append(record)
        for line in _skipped(ended):
            progress.tell(line)
    return ended


def _packed(
    cells: Sequence[Cell],
    job: Job,
    folder: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
) -> Job:
    """Return the run with what its cells take of a GPU, and tell it.

    Raises:
        Stopped: the run was interrupted.
    """
    on_gpus = [cell for cell in cells if cell.device == "cuda"]
    if not on_gpus:
        return job
    tell(f"packing: predicting the memory of {len(on_gpus)} cells")
    models = environment.gpu_names()
    needs = packing.predict(on_gpus, models, job, folder=folder, stop=stop)
    alone = [cell for cell in on_gpus if cell not in needs]
    if alone:
        tell(
            f"packing: {len(alone)} of {len(on_gpus)} cells ({_names(alone)}) have no "
            f"prediction, and run alone; {folder / 'packing.log'} may say why"
        )
    return dataclasses.replace(job, gpu_bytes=needs)


def _left_out(plan: RunPlan, done: Mapping[Cell, Record]) -> Iterator[str]:
    """Yield what the sweep declares and this run omits, a line for each reason."""
    yield from plan.left_out
    if done:
        yield (
            f"not run again, {len(done)} of {len(plan.cells)} ({_names([*done])}): ok "
            "under the same code, machine and versions of packages; "
            f"{_other_load(plan, done.values())}`--force` runs them, too"
        )


def _other_load(plan: RunPlan, done: Iterable[Record]) -> str:
    """Return how many cells ran with other threads or slots, on which times depend."""
    loads = [(r.environment.num_threads, r.environment.num_slots) for r in done]
    others = [
        load for load in loads if load != (plan.options.num_threads, plan.num_slots)
    ]
    if not others:
        return ""
    texts = [
        f"--threads {threads} --slots {slots}" for threads, slots in sorted(set(others))
    ]
    return f"{len(others)} of them ran with {', '.join(texts)}; "


def _skipped(ended: Sequence[Record]) -> Iterator[str]:
    """Yield why cells were skipped, a line for each reason."""
    reasons: dict[str, list[Cell]] = {}
    for record in ended:
        if record.status == Status.SKIPPED:
            reasons.setdefault(record.message, []).append(record.cell)
    for reason, cells in list(reasons.items())[:NUM_REASONS]:
        yield f"skipped, {len(cells)} of {len(ended)} ({_names(cells)}): {reason}"
    if len(reasons) > NUM_REASONS:
        rest = len(reasons) - NUM_REASONS
        yield f"skipped, for {rest} more reasons: `meft-bench show CELL FILE` says why"


def _names(cells: Sequence[Cell]) -> str:
    names = ", ".join(cell.id for cell in cells[:NUM_NAMED])
    rest = len(cells) - NUM_NAMED
    return f"{names} and {rest} more" if rest > 0 else names


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
