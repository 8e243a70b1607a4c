"""The command line of `meft-bench`: commands, their options, the types of values."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from meft_bench.parent import engines, fields, output, planning, sweep
from meft_bench.shared import distributions, registry
from meft_bench.shared.units import parse_bytes
from meft_bench.virtual.device import gpu

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


def parser() -> argparse.ArgumentParser:
    """Return the parser of `meft-bench` with those of its commands."""
    parser = BenchParser(prog="meft-bench", description="Measure ways of fine-tuning.")
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
        "--engine",
        choices=engines.NAMES,
        default="local",
        help="where cells run: on this machine (default), or on a Ray cluster",
    )
    run.add_argument(
        "--slots",
        type=_cores,
        help="cells run side by side on this machine (default: one for each GPU, or 1; "
        "with --pack, one for each core)",
    )
    run.add_argument(
        "--pack",
        action="store_true",
        help="let cells share a GPU whose free memory has room for what is predicted "
        "for all of them; their times are not compared",
    )
    run.add_argument(
        "--threads",
        type=_cores,
        help="threads of each child (default: cores / slots; with --engine ray 1)",
    )
    run.add_argument("--timeout", type=_seconds, help="seconds for each cell")
    run.add_argument(
        "--time-budget",
        type=_duration,
        help="end the run after this long, such as 8min or 90s",
    )
    run.add_argument(
        "--memory-limit",
        type=_size,
        help="host memory of each cell, such as 8GiB: of its data, and of what its "
        "processes hold together",
    )
    run.add_argument(
        "--force", action="store_true", help="run the cells that are done, too"
    )
    run.add_argument(
        "--fresh",
        action="store_true",
        help="start a new interpreter for each cell, instead of a fork of one process "
        "that has imported everything",
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
    fitted.add_argument(
        "--multiple",
        type=_count,
        default=1,
        help="look among the multiples of this number, with fewer probes; default 1",
    )
    fitted.add_argument(
        "-o",
        "--output",
        type=Path,
        help="append a record for each answer; answers that are in the file are not "
        "looked for again",
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
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="a method, a cell's id, or a part of ids; several times for several",
    )


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "backbone",
        nargs="?",
        help="a shape such as roberta-large or opt-66b, a packaged backbone, a "
        "directory, a config.json, or hub:NAME; no weights are read",
    )
    parser.add_argument(
        "--script",
        metavar="FILE:FUNCTION",
        help="instead of a backbone, a function of your own that makes a model and "
        "trains it for two steps; `fit` calls it with a batch size",
    )
    parser.add_argument(
        "--ranks",
        type=_count,
        default=1,
        help="with --script, the number of processes that train together, each on a "
        "GPU of its own; the plan is that of one of them",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        help="names, or all; one of each kind by default",
    )
    names = ", ".join(gpu.names())
    parser.add_argument("--gpu", required=True, help=f"{names}, or a JSON file")
    parser.add_argument("--batch", type=_count, help="default 8")
    parser.add_argument(
        "--seq",
        nargs="+",
        metavar="TOKENS",
        help="tokens of a row, default 512; several are the lengths of several steps, "
        "and p50=190 p90=310 max=768 a distribution of the lengths of rows, which are "
        "spread evenly between these",
    )
    parser.add_argument(
        "--padding",
        choices=planning.PADDINGS,
        default="worst",
        help="whether batches have padding; the default plans both and shows the one "
        "that needs most",
    )
    parser.add_argument("--depth", type=_count, help="default: its own")
    parser.add_argument("--accumulation", type=_count, default=1, help="default 1")
    parser.add_argument("--dtype", choices=registry.DTYPES, default="fp32")
    parser.add_argument(
        "--weights-dtype",
        choices=registry.WEIGHTS_DTYPES,
        help="default fp32: autocast; nf4, nf4-double and int8 quantise linear layers",
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


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, help="directory of data (default: $MEFT_DATA_DIR)"
    )


class BenchParser(argparse.ArgumentParser):
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
        """Print one line, with the nearest option if one is unknown, and exit."""
        hint = self._misspelt()
        output.complain(f"{self.prog}: {message}{hint}; see {self.prog} --help")
        self.exit(output.EXIT_USAGE)

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help; argparse itself hides that it could not be printed."""
        print(self.format_help(), end="", file=file)


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
    try:
        if text.startswith(registry.VIRTUAL) or text.endswith(".json"):
            # Whole paths, as children run in another folder.
            text = f"{registry.VIRTUAL}{gpu.resolve(gpu.name_in(text))}"
        return str(fields.check("device", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
