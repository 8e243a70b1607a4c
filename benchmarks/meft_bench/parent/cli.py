"""The command `meft-bench`: list, run, plan, fit, show, doctor.

Exit codes, which benchmarks/README.md explains for each command:

    0    success: cells are ok, a method fits
    2    the command or a file that it names is wrong, or there is no room to write
    3    every cell of a run was skipped
    4    a cell failed, nothing fits, or a requirement of every run is missing
    130  interrupted
    141  the reader of the output closed it
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meft_bench.parent import (
    arguments,
    doctor,
    fit_records,
    harness,
    output,
    planning,
    runs,
    selection,
    show,
    trained,
    trials,
)
from meft_bench.parent.engines.ray_cluster import ClusterError
from meft_bench.parent.planning import PlanningError
from meft_bench.parent.runs import RunsError
from meft_bench.parent.selection import UsageError
from meft_bench.parent.sweep import SweepError
from meft_bench.shared import registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status
from meft_bench.shared.request import WORKER
from meft_bench.virtual.device import gpu
from meft_bench.virtual.prediction import plan_text


def main(argv: Sequence[str] | None = None, *, worker_module: str = WORKER) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the words after the program's name; None takes them from `sys.argv`.
        worker_module: module that runs as the child; tests use their own.
    """
    output.prepare()
    try:
        try:
            return _command(arguments.parser().parse_args(argv), worker_module)
        finally:
            sys.stdout.flush()  # where a failure can be reported
    except BrokenPipeError:
        output.forget(sys.stdout)
        return output.EXIT_CLOSED
    except KeyboardInterrupt:
        output.complain("meft-bench: interrupted")
        return harness.EXIT_INTERRUPTED
    except (SweepError, RunsError, UsageError, PlanningError, ClusterError) as error:
        output.complain(f"meft-bench: {error}")
    except OSError as error:
        place = "output" if error.errno in runs.NO_ROOM else "system"
        output.complain(f"meft-bench: {error.filename or place}: {error.strerror}")
        output.forget(sys.stdout)
    return output.EXIT_USAGE


def _command(given: argparse.Namespace, worker_module: str) -> int:
    if given.command == "list":
        return _list(given)
    if given.command == "run":
        return harness.run(selection.run_plan(given), worker_module=worker_module)
    if given.command in ("plan", "fit"):
        return _plan_or_fit(given)
    if given.command == "show":
        return _show(given)
    return _doctor(given)


def _plan_or_fit(given: argparse.Namespace) -> int:
    is_plan, margin = given.command == "plan", given.margin
    maximize = None if is_plan else given.maximize
    script = None if given.script is None else planning.script(given)
    cells = planning.cells(given) if script is None else []
    options = ChildOptions(allow_download=given.allow_download)
    if not is_plan and given.output is not None and script is None:
        return _fit_into_file(given, cells, options)
    timeline = given.timeline if is_plan else None
    if timeline is not None and not timeline.parent.is_dir():
        raise UsageError(f"--timeline: there is no folder {str(timeline.parent)!r}")
    wants: dict[str, Any] = {"margin": margin, "timeline": timeline is not None}
    if script is None:
        wants |= {"seq": given.seq or (), "padding": given.padding}
        wants |= {} if is_plan else {"multiple": given.multiple}
        plans = planning.ask(cells, options, maximize=maximize, **wants)
    else:
        plans = planning.ask_script(script, options, maximize=not is_plan, **wants)
    refused = planning.unanswered(plans)
    if timeline is not None and len(refused) < len(plans):
        plan_text.write_timeline(plans, timeline)
    if given.json:
        print(json.dumps(plans, indent=2))
    if len(refused) == len(plans):
        reasons = "; ".join(plan_text.reasons(plans))
        raise PlanningError(f"nothing can be planned: {reasons}")
    if not given.json and script is not None:
        found = gpu.find(script["gpu"])
        print(plan_text.summary(found, plans[0], margin, maximize))
    elif not given.json:
        print(plan_text.table(cells, plans, maximize, margin, given.seq or ()))
        for plan in plans if is_plan and given.details else ():
            print(f"\n{plan_text.details(plan)}")
    if refused:
        names = ", ".join(plan["method"] for plan in refused)
        output.complain(
            f"meft-bench: no plan for {len(refused)} of {len(plans)} methods: {names}"
        )
    if not planning.anything_fits(plans):
        output.complain(f"meft-bench: nothing fits on {given.gpu}")
        return harness.EXIT_FAILED
    return harness.EXIT_OK


def _fit_into_file(
    given: argparse.Namespace, cells: list[Cell], options: ChildOptions
) -> int:
    """Append a record for each cell that is not in the file, one search at a time."""
    field = planning.FIELDS[given.maximize]
    caveat = fit_records.caveat_of(
        given.margin, given.multiple, given.seq or (), given.padding
    )
    where = harness.environments_for(tuple(cells), num_threads=1, num_slots=1)
    num_fitting = 0
    found: list[tuple[Cell, dict[str, Any]]] = []
    with runs.RecordsFile(given.output) as file:
        places = {planning.named(cell): cell for cell in cells}
        left = fit_records.left([*places], file.records, where, field, caveat)
        for cell in left:
            started_at = datetime.now(UTC).isoformat(timespec="seconds")
            start = time.monotonic()
            (plan,) = planning.ask(
                [places[cell]],
                options,
                maximize=given.maximize,
                margin=given.margin,
                seq=given.seq or (),
                padding=given.padding,
                multiple=given.multiple,
            )
            if plan["verdict"] == "unknown":
                output.complain(f"meft-bench: no plan: {plan['message']}")
                continue
            answer = fit_records.record(
                cell,
                plan,
                field=field,
                caveat=caveat,
                environment=where[cell.device],
                started_at=started_at,
                wall_seconds=time.monotonic() - start,
            )
            file.append(answer)
            num_fitting += answer.status == Status.OK
            found.append((cell, plan))
            output.complain(f"meft-bench: recorded {answer.cell.id}")
    if given.json:
        print(json.dumps([plan for _, plan in found], indent=2))
    elif found:
        some, plans = zip(*found, strict=True)
        print(
            plan_text.table(some, plans, given.maximize, given.margin, given.seq or ())
        )
    output.summarize(
        [
            f"{len(left)} of {len(cells)} looked for, the others are recorded",
            f"records: {given.output}",
            f"page:    meft-report page {given.output} -o "
            f"{given.output.with_suffix('.html')}",
        ]
    )
    return harness.EXIT_OK if num_fitting or not left else harness.EXIT_FAILED


def _list(given: argparse.Namespace) -> int:
    chosen = selection.load(given)
    cells = list(selection.select(chosen, *given.only))
    tunings = selection.select_tunings(chosen, *given.only)
    path = selection.records_path(given, chosen)
    records = runs.read(path, lean=True)
    if records:  # otherwise the sources need not be read
        tunings = trials.grown(tunings, lambda some: _ended(records, some))
    cells += [trial for tuning in tunings for trial in tuning.trials]
    every = [*cells, *(cell for one in tunings for cell in one.cells)]
    trainings = selection.select_trainings(chosen, every)
    cells = [*dict.fromkeys((*trainings.values(), *cells))]
    done: dict[Cell, Record] = {}
    waiting: list[Cell] = []
    if records:
        done = _done(records, cells)
    for tuning in tunings:
        best = trials.best_of(tuning, done)
        if best is None or any(trial not in done for trial in tuning.trials):
            waiting += tuning.cells
        else:
            cells += tuning.cells_with(best)
    if records:
        done = _done(records, cells)
    _, saves = trained.with_folders(chosen.own, trainings, path)
    for cell in trained.on_other_weights(done, trainings, saves):
        del done[cell]
    lines = [f"{'done' if cell in done else '    '}  {cell.id}" for cell in cells]
    lines += [f"then  {cell.id}, with what its trials choose" for cell in waiting]
    lines += [
        f"{one.alias or one.spelt} is {value}" for value, one in chosen.own.items()
    ]
    total = len(cells) + len(waiting)
    print("\n".join([*lines, f"{total} cells, {len(done)} done in {path}"]))
    return harness.EXIT_OK


def _done(records: list[Record], cells: Sequence[Cell]) -> dict[Cell, Record]:
    return runs.done(records, cells, _environments(cells))


def _ended(records: list[Record], cells: Sequence[Cell]) -> dict[Cell, Record]:
    return runs.ended(records, cells, _environments(cells))


def _environments(cells: Sequence[Cell]) -> Mapping[str, Environment]:
    return harness.environments_for(tuple(cells), num_threads=1, num_slots=1)


def _show(given: argparse.Namespace) -> int:
    path: Path = given.runs
    if not path.exists():
        raise UsageError(f"records file {str(path)!r} does not exist")
    records = runs.read(path)
    if not records:
        raise UsageError(f"records file {str(path)!r} holds no records")
    last = {record.cell.id: record for record in records}
    named = {name: (record.aliases or {}).values() for name, record in last.items()}
    found = [name for name in last if given.cell in (name, *named[name])]
    found = found or [name for name in last if given.cell in name]
    if given.cell in last:
        found = [given.cell]
    if len(found) != 1:
        hint = registry.nearest(given.cell, found or last)
        many = f"{len(found)} cells" if found else "no cell"
        raise UsageError(f"{many} in {path} named {given.cell!r}; {hint}")
    _print_pairs(show.describe(last[found[0]]))
    return harness.EXIT_OK


def _doctor(given: argparse.Namespace) -> int:
    entries = list(doctor.examine(selection.data_dir(given)))
    _print_pairs((entry.thing, entry.state) for entry in entries)
    missing = [entry.thing for entry in entries if entry.is_missing]
    if missing:
        output.complain(f"meft-bench: missing: {', '.join(missing)}")
        return harness.EXIT_FAILED
    return harness.EXIT_OK


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        print(f"{name:<24}  {value}")
