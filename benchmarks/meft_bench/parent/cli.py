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
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from meft_bench.parent import (
    doctor,
    environment,
    fields,
    harness,
    output,
    planning,
    runs,
    show,
    sweep,
)
from meft_bench.parent.harness import RunPlan
from meft_bench.parent.planning import PlanningError
from meft_bench.parent.runs import RunsError
from meft_bench.parent.sweep import Sweep, SweepError
from meft_bench.shared import distributions, registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Record
from meft_bench.shared.request import WORKER
from meft_bench.shared.units import parse_bytes
from meft_bench.virtual.device import gpu

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

EXIT_USAGE = 2


class UsageError(Exception):
    """Raised for a command line that cannot be executed; the message is one line."""


def main(argv: Sequence[str] | None = None, *, worker_module: str = WORKER) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the words after the program's name; None takes them from `sys.argv`.
        worker_module: module that runs as the child; tests use their own.
    """
    output.prepare()
    try:
        try:
            return _command(_parser().parse_args(argv), worker_module)
        finally:
            sys.stdout.flush()  # where a failure can be reported
    except BrokenPipeError:
        output.forget(sys.stdout)
        return output.EXIT_CLOSED
    except KeyboardInterrupt:
        output.complain("meft-bench: interrupted")
        return harness.EXIT_INTERRUPTED
    except (SweepError, RunsError, UsageError, PlanningError) as error:
        output.complain(f"meft-bench: {error}")
    except OSError as error:
        place = "output" if error.errno in runs.NO_ROOM else "system"
        output.complain(f"meft-bench: {error.filename or place}: {error.strerror}")
        output.forget(sys.stdout)
    return EXIT_USAGE


def _command(arguments: argparse.Namespace, worker_module: str) -> int:
    if arguments.command == "list":
        return _list(arguments)
    if arguments.command == "run":
        return harness.run(_plan(arguments), worker_module=worker_module)
    if arguments.command in ("plan", "fit"):
        return _plan_or_fit(arguments)
    if arguments.command == "show":
        return _show(arguments)
    return _doctor(arguments)


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, with one line for every error."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named, allow_abbrev=False)
        self._words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse as argparse does, which gives a command's words to its own parser."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # else the main parser, with other options, reports it
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _misspelt(self) -> str:
        """Return the first unknown option with the nearest valid one, as text.

        The text is empty if all options are known.
        """
        options = [*self._option_string_actions]
        for word in self._words:
            name = word.partition("=")[0]
            if (
                name.startswith("-")
                and name.strip("-.0123456789")
                and (name not in options)
            ):
                return f"; {name}: {registry.nearest(name, options)}"
        return ""

    def error(self, message: str) -> NoReturn:
        hint = self._misspelt()
        output.complain(f"{self.prog}: {message}{hint}; see {self.prog} --help")
        self.exit(EXIT_USAGE)

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help; argparse itself hides that it could not be printed."""
        print(self.format_help(), end="", file=file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meft-bench", description="Measure ways of fine-tuning.")
    version = f"meft {distributions.installed('meft') or 'of a checkout'}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_sweep(commands.add_parser("list", help="print the cells of a sweep"))
    run = commands.add_parser("run", help="run the cells that are not done yet")
    _add_sweep(run)
    _add_data(run)
    run.add_argument(
        "--allow-download",
        action="store_true",
        help="let weights and data be fetched from the hub",
    )
    run.add_argument(
        "--slots", type=_cores, default=1, help="cells run side by side (default 1)"
    )
    run.add_argument(
        "--threads", type=_cores, help="threads of each child (default: cores / slots)"
    )
    run.add_argument("--timeout", type=_seconds, help="seconds for each cell")
    run.add_argument(
        "--time-budget",
        type=_duration,
        help="end the run after this long, such as 8min or 90s",
    )
    run.add_argument(
        "--memory-limit", type=_size, help="data of each child, such as 8GiB"
    )
    run.add_argument(
        "--force", action="store_true", help="run the cells that are done, too"
    )
    planned = commands.add_parser("plan", help="tell what a step takes on a GPU")
    _add_shape(planned)
    planned.add_argument(
        "--details", action="store_true", help="tell where memory and traffic come from"
    )
    planned.add_argument(
        "--timeline", type=Path, help="write every moment of the step here, as CSV"
    )
    fitted = commands.add_parser("fit", help="tell the largest that fits on a GPU")
    _add_shape(fitted)
    fitted.add_argument(
        "--maximize", choices=planning.FIELDS, default="batch", help="default: batch"
    )
    shown = commands.add_parser("show", help="print the last record of a cell")
    shown.add_argument("cell", help="its id, or a part that only one cell's has")
    shown.add_argument("runs", type=Path, help="records file")
    _add_data(commands.add_parser("doctor", help="tell what this machine has"))
    return parser


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(sweep.shipped())
    parser.add_argument("sweep", help=f"{names}, or the path of a TOML file")
    parser.add_argument(
        "-o", "--output", type=Path, help="records file (default runs/SWEEP.jsonl)"
    )
    parser.add_argument(
        "--device",
        type=_device,
        help=f"{', '.join(registry.DEVICES)}, or virtual-PATH.json; "
        "default: cuda where NVML sees a GPU",
    )
    parser.add_argument("--only", help="a method, or a part of the cells' ids")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "backbone",
        help="a shape such as roberta-large or opt-66b, a packaged backbone, a "
        "directory, a config.json, or hub:NAME; no weights are read",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        help="names, or all (the default)",
    )
    names = ", ".join(gpu.names())
    parser.add_argument("--gpu", required=True, help=f"{names}, or a JSON file")
    parser.add_argument("--batch", type=_count, help="default 8")
    parser.add_argument("--seq", type=_count, help="default 512")
    parser.add_argument("--depth", type=_count, help="default: its own")
    parser.add_argument("--accumulation", type=_count, default=1, help="default 1")
    parser.add_argument("--dtype", choices=registry.DTYPES, default="fp32")
    parser.add_argument(
        "--weights-dtype", choices=registry.DTYPES, help="default fp32: autocast"
    )
    parser.add_argument("--attention", choices=registry.ATTENTIONS, default="sdpa")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="other fields of a cell, such as num_neurons=6400 active_fraction=0.5",
    )
    parser.add_argument(
        "--margin", type=_share, default=0.05, help="memory left free; default 0.05"
    )
    parser.add_argument(
        "--allow-download", action="store_true", help="let a config be fetched"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan_or_fit(arguments: argparse.Namespace) -> int:
    is_plan, margin = arguments.command == "plan", arguments.margin
    maximize = None if is_plan else arguments.maximize
    cells = planning.cells(arguments)
    options = ChildOptions(allow_download=arguments.allow_download)
    timeline = arguments.timeline if is_plan else None
    if timeline is not None and not timeline.parent.is_dir():
        raise UsageError(f"--timeline: there is no folder {str(timeline.parent)!r}")
    plans = planning.ask(
        cells,
        options,
        maximize=maximize,
        margin=margin,
        timeline=timeline is not None,
    )
    refused = planning.unanswered(plans)
    if timeline is not None and len(refused) < len(plans):
        planning.write_timeline(plans, timeline)
    if arguments.json:
        print(json.dumps(plans, indent=2))
    if len(refused) == len(plans):
        reasons = "; ".join(planning.reasons(plans))
        raise PlanningError(f"nothing can be planned: {reasons}")
    if not arguments.json:
        print(planning.table(cells, plans, maximize, margin))
        for plan in plans if is_plan and arguments.details else ():
            print(f"\n{planning.details(plan)}")
    if refused:
        names = ", ".join(plan["method"] for plan in refused)
        output.complain(
            f"meft-bench: no plan for {len(refused)} of {len(plans)} methods: {names}"
        )
    if not planning.anything_fits(plans):
        output.complain(f"meft-bench: nothing fits on {arguments.gpu}")
        return harness.EXIT_FAILED
    return harness.EXIT_OK


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, help="directory of data (default: $MEFT_DATA_DIR)"
    )


def _list(arguments: argparse.Namespace) -> int:
    chosen = _load(arguments)
    cells = _select(chosen, arguments.only)
    path = _records_path(arguments, chosen)
    records = runs.read(path)
    done: dict[Cell, Record] = {}
    if records:  # otherwise the sources need not be read
        environments = harness.environments_for(cells, num_threads=1, num_slots=1)
        done = runs.done(records, cells, environments)
    lines = [f"{'done' if cell in done else '    '}  {cell.id}" for cell in cells]
    print("\n".join([*lines, f"{len(cells)} cells, {len(done)} done in {path}"]))
    return harness.EXIT_OK


def _plan(arguments: argparse.Namespace) -> RunPlan:
    """Return the run that the command line describes, after checking all of it."""
    chosen = _load(arguments)
    cells = _select(chosen, arguments.only)
    if any(cell.device == "cuda" for cell in cells) and not environment.gpu_names():
        reason = environment.why_no_gpu()
        raise UsageError(f"device cuda: no GPU here ({reason}); use --device cpu")
    device = _default_device(arguments)
    if chosen.checks and device == "cpu":
        raise UsageError(
            f"sweep {chosen.name!r} checks a GPU and there is none here; "
            "--device virtual-H200 predicts one"
        )
    data_dir = _data_dir(arguments)
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"data directory {str(data_dir)!r} does not exist")
    spare = max(1, environment.num_cores() // arguments.slots)
    return RunPlan(
        sweep=chosen.name,
        cells=cells,
        path=_records_path(arguments, chosen),
        options=ChildOptions(
            data_dir=None if data_dir is None else str(data_dir.resolve()),
            allow_download=arguments.allow_download,
            num_threads=arguments.threads or chosen.num_threads or spare,
            memory_limit_bytes=arguments.memory_limit or chosen.memory_limit_bytes,
        ),
        num_slots=arguments.slots,
        timeout_seconds=arguments.timeout or chosen.timeout_seconds,
        force=arguments.force,
        left_out=tuple(_left_out(chosen, cells, arguments.only, arguments.device)),
        checks=chosen.checks if arguments.only is None else (),
        check_device=device,
        time_budget_seconds=arguments.time_budget,
    )


def _left_out(
    chosen: Sweep, cells: Sequence[Cell], only: str | None, device: str | None
) -> Iterator[str]:
    """Yield what the sweep declares and the command line does not select.

    Args:
        chosen: the sweep.
        cells: the selected cells.
        only: value of `--only`.
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
        yield f"not selected, {num_others} of {len(chosen.cells)}: `--only {only}`"


def _show(arguments: argparse.Namespace) -> int:
    path: Path = arguments.runs
    if not path.exists():
        raise UsageError(f"records file {str(path)!r} does not exist")
    records = runs.read(path)
    if not records:
        raise UsageError(f"records file {str(path)!r} holds no records")
    last = {record.cell.id: record for record in records}
    found = [name for name in last if arguments.cell in name]
    if arguments.cell in last:
        found = [arguments.cell]
    if len(found) != 1:
        hint = registry.nearest(arguments.cell, found or last)
        many = f"{len(found)} cells" if found else "no cell"
        raise UsageError(f"{many} in {path} named {arguments.cell!r}; {hint}")
    _print_pairs(show.describe(last[found[0]]))
    return harness.EXIT_OK


def _doctor(arguments: argparse.Namespace) -> int:
    entries = list(doctor.examine(_data_dir(arguments)))
    _print_pairs((entry.thing, entry.state) for entry in entries)
    missing = [entry.thing for entry in entries if entry.is_missing]
    if missing:
        output.complain(f"meft-bench: missing: {', '.join(missing)}")
        return harness.EXIT_FAILED
    return harness.EXIT_OK


def _load(arguments: argparse.Namespace) -> Sweep:
    return sweep.load(arguments.sweep, device=_default_device(arguments))


def _default_device(arguments: argparse.Namespace) -> str:
    """Return the device of checks, and of cells whose matrix does not name one."""
    return arguments.device or ("cuda" if environment.gpu_names() else "cpu")


def _select(chosen: Sweep, only: str | None) -> tuple[Cell, ...]:
    """Return the cells of the method `only`, or those with `only` in their ids."""
    if only is None:
        return chosen.cells
    if only in registry.METHODS:
        cells = tuple(cell for cell in chosen.cells if cell.method == only)
    else:
        cells = tuple(cell for cell in chosen.cells if only in cell.id)
    if not cells:
        methods = {cell.method for cell in chosen.cells}
        hint = registry.nearest(only, methods)
        raise UsageError(f"--only {only!r} matches no cell of {chosen.name}; {hint}")
    return cells


def _records_path(arguments: argparse.Namespace, chosen: Sweep) -> Path:
    path: Path = arguments.output or Path("runs", f"{chosen.name}.jsonl")
    if path.suffix != ".jsonl":  # the names of logs and page are derived from it
        raise UsageError(f"records file {str(path)!r} should end in .jsonl")
    return path


def _data_dir(arguments: argparse.Namespace) -> Path | None:
    named = arguments.data or os.environ.get("MEFT_DATA_DIR")
    return Path(named) if named else None


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        print(f"{name:<24}  {value}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _cores(text: str) -> int:
    if _count(text) > sweep.MOST_THREADS:
        most = f"{sweep.MOST_THREADS:,}"
        raise argparse.ArgumentTypeError(f"{text!r} is more than {most}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return seconds


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)(s|min|h)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 8min or 90s")
    seconds = {None: 1, "s": 1, "min": 60, "h": 3600}
    return _seconds(found[1]) * seconds[found[2]]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return share


def _device(text: str) -> str:
    if text.endswith(".json"):  # children run in another folder
        text = f"{registry.VIRTUAL}{Path(gpu.name_in(text)).resolve()}"
    try:
        return str(fields.check("device", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
