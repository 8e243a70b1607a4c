"""From a command line to a sweep, the cells of it that are selected, and a run."""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from meft_bench.parent import sweep
from meft_bench.parent.engines import environment, host_memory
from meft_bench.parent.harness import RunPlan
from meft_bench.parent.sweep import Sweep
from meft_bench.parent.trials import Tuning
from meft_bench.shared import published, registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.units import format_bytes

SLOT_BYTES = 4 * 2**30
"""Host memory that a cell is taken to need where the number of slots is not given."""


class UsageError(Exception):
    """Raised for a command line that cannot be executed; the message is one line."""


def run_plan(arguments: argparse.Namespace) -> RunPlan:
    """Return the run that the command line describes, after checking all of it.

    Raises:
        UsageError: it cannot be executed.
    """
    chosen = load(arguments)
    cells = select(chosen, *arguments.only)
    tunings = select_tunings(chosen, *arguments.only)
    every = [*cells, *(cell for one in tunings for cell in one.cells)]
    here = arguments.engine == "local"
    on_gpu = any(cell.device == "cuda" for cell in every)
    if here and on_gpu and not environment.gpu_names():
        reason = environment.why_no_gpu()
        raise UsageError(f"device cuda: no GPU here ({reason}); use --device cpu")
    trainings = select_trainings(chosen, every)
    device = _default_device(arguments)
    if device == "cpu" and set(chosen.checks) - {published.CHECK}:
        raise UsageError(
            f"sweep {chosen.name!r} checks a GPU and there is none here; "
            "--device virtual-H200 predicts one"
        )
    folder = data_dir(arguments)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"data directory {str(folder)!r} does not exist")
    slots, words = _slots(arguments, chosen, every)
    most_ranks = max((cell.ranks for cell in every), default=1)
    spare = max(1, environment.num_cores() // (slots * most_ranks))
    spare = 1 if arguments.engine == "ray" else spare
    return RunPlan(
        sweep=chosen.name,
        question=chosen.question,
        caveats=chosen.caveats,
        cells=cells,
        path=records_path(arguments, chosen),
        options=ChildOptions(
            data_dir=None if folder is None else str(folder.resolve()),
            allow_download=arguments.allow_download,
            num_threads=arguments.threads or chosen.num_threads or spare,
            memory_limit_bytes=arguments.memory_limit or chosen.memory_limit_bytes,
        ),
        num_slots=slots,
        timeout_seconds=arguments.timeout or chosen.timeout_seconds,
        force=arguments.force,
        fresh=arguments.fresh,
        left_out=(
            *_left_out(chosen, cells, arguments.only, arguments.device),
            *words,
        ),
        checks=() if arguments.only else chosen.checks,
        check_device=device,
        time_budget_seconds=arguments.time_budget,
        own=chosen.own,
        tunings=tunings,
        pack=arguments.pack,
        engine=arguments.engine,
        trainings=trainings,
    )


def _slots(
    arguments: argparse.Namespace, chosen: Sweep, cells: Sequence[Cell]
) -> tuple[int, list[str]]:
    """Return the number of cells that run side by side here, and why it is less.

    If the command line does not say it, there is one for each GPU, or one if no cell
    runs on a real GPU; with `--pack`, as many as there are cores for the threads of a
    cell. There are never more than free host memory has room for, at `SLOT_BYTES` each,
    or at the memory limit of a cell if there is one.
    """
    on_gpus = any(cell.device == "cuda" for cell in cells)
    if arguments.pack:
        _check_pack(arguments.engine, on_gpus)
    if arguments.engine == "ray" and arguments.slots is not None:
        raise UsageError(
            "--slots counts cells of this machine, and with --engine ray the cluster "
            "runs as many as it has cores and GPUs for: leave it out"
        )
    if arguments.slots is not None:
        return int(arguments.slots), []
    ranks = max((cell.ranks for cell in cells if cell.device == "cuda"), default=1)
    wanted = max(1, len(environment.gpus()) // ranks) if on_gpus else 1
    if arguments.pack:
        threads = arguments.threads or chosen.num_threads or 1
        wanted = max(wanted, environment.num_cores() // threads)
    size = arguments.memory_limit or chosen.memory_limit_bytes or SLOT_BYTES
    free = host_memory.free_bytes()
    if free is None or wanted * size <= free or wanted == 1:
        return wanted, []
    slots = max(1, free // size)
    return slots, [
        f"{slots} cells side by side, and not {wanted}: {format_bytes(free)} of host "
        f"memory are free, at {format_bytes(size)} each; `--slots` sets another number"
    ]


def _check_pack(engine: str, on_gpus: bool) -> None:
    """Raise `UsageError` where `--pack` has no effect."""
    if engine == "ray":
        raise UsageError(
            "--pack lets cells share the GPUs of this machine, and with --engine ray "
            "each has a GPU of its own: leave it out, or take --engine local"
        )
    if not on_gpus:
        raise UsageError(
            "--pack lets cells share a real GPU, and none of these runs on one: give "
            "`--device cuda`, or `--slots` for cells of the CPU"
        )


def _left_out(
    chosen: Sweep, cells: Sequence[Cell], only: Sequence[str], device: str | None
) -> Iterator[str]:
    """Yield what the sweep declares and the command line does not select.

    Args:
        chosen: the sweep.
        cells: the selected cells.
        only: values of `--only`.
        device: value of `--device`.
    """
    if chosen.num_excluded:
        yield f"excluded, {chosen.num_excluded}: by the sweep's own rules"
    if device is not None:
        others = sorted({cell.device for cell in cells} - {device})
        if others:
            yield f"not on {device}: the sweep itself names {', '.join(others)}"
    num_others = len(chosen.cells) - len(cells)
    if num_others:
        words = " ".join(f"--only {one}" for one in only)
        yield f"not selected, {num_others} of {len(chosen.cells)}: `{words}`"


def load(arguments: argparse.Namespace) -> Sweep:
    """Return the sweep that the command line names."""
    return sweep.load(arguments.sweep, device=_default_device(arguments))


def _default_device(arguments: argparse.Namespace) -> str:
    """Return the device of checks, and of cells whose matrix does not name one."""
    return arguments.device or ("cuda" if environment.gpu_names() else "cpu")


def select(chosen: Sweep, *only: str) -> tuple[Cell, ...]:
    """Return the cells that any of `only` selects; all, if there are none.

    They are the cell of this id, else the cells of this method, or with this name of
    the user, else those with it in their ids.

    Raises:
        UsageError: there is no such cell.
    """
    if not only:
        return chosen.cells
    selected = {cell for one in only for cell in _matching(chosen, one)}
    return tuple(cell for cell in chosen.cells if cell in selected)


def select_tunings(chosen: Sweep, *only: str) -> tuple[Tuning, ...]:
    """Return the trials of which any of `only` selects a cell that waits for them."""
    if not only:
        return chosen.tunings
    selected = {cell for one in only for cell in _matching(chosen, one)}
    return tuple(one for one in chosen.tunings if selected & {*one.cells})


def select_trainings(chosen: Sweep, cells: Iterable[Cell]) -> dict[str, Cell]:
    """Return the cells that train backbones of some cells, by what these hold.

    Cells of virtual GPUs need the shape of a backbone only.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        training = chosen.trainings.get(cell.backbone)
        if training is not None and not cell.device.startswith(registry.VIRTUAL):
            on_its_device = dataclasses.replace(training, device=cell.device)
            found.setdefault(cell.backbone, on_its_device)
    return found


def _matching(chosen: Sweep, only: str) -> tuple[Cell, ...]:
    """Return what `only` selects of all cells, with those that wait for trials."""
    waiting = (cell for tuning in chosen.tunings for cell in tuning.cells)
    every = (*chosen.cells, *waiting)
    if not every:
        raise UsageError(
            f"--only selects cells, and sweep {chosen.name!r} has none: it has checks"
        )
    values = {one.alias or one.spelt: value for value, one in chosen.own.items()}
    method = values.get(only, only)
    if method in {cell.method for cell in every} or method in registry.METHODS:
        cells = tuple(cell for cell in every if cell.method == method)
    elif only in values:
        value = values[only]
        cells = tuple(c for c in every if value in (c.backbone, c.task))
    else:
        # The id of a cell may begin another one's.
        its = tuple(cell for cell in every if cell.id == only)
        cells = its or tuple(cell for cell in every if only in cell.id)
    if not cells:
        methods = {cell.method for cell in every}
        hint = registry.nearest(only, [*methods, *values])
        raise UsageError(f"--only {only!r} matches no cell of {chosen.name}; {hint}")
    return cells


def records_path(arguments: argparse.Namespace, chosen: Sweep) -> Path:
    """Return the records file of a sweep.

    Raises:
        UsageError: its name does not end in `.jsonl`.
    """
    path: Path = arguments.output or Path("runs", f"{chosen.name}.jsonl")
    if path.suffix != ".jsonl":  # the names of logs and page are derived from it
        raise UsageError(f"records file {str(path)!r} should end in .jsonl")
    return path


def data_dir(arguments: argparse.Namespace) -> Path | None:
    """Return the directory of data that the user names, or None."""
    named = arguments.data or os.environ.get("MEFT_DATA_DIR")
    return Path(named) if named else None
