"""The command `meft-report`: from files of records to tables, plots, a page, a verdict.

Every user error is one line on stderr and exit code 2, and writes nothing. An
unexpected exception is a bug of this program and exit code 70 (`EX_SOFTWARE` of BSD),
never the code of a verdict. pandas and matplotlib are imported by the commands that
need them, so that `--help` is fast.
"""

import argparse
import contextlib
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from meft_reports import settings
from meft_reports.errors import ReportError, UnknownName
from meft_reports.files import write_atomically
from meft_reports.plots import PLOTS, find_plot
from meft_reports.tables import TABLES, find_maker
from meft_reports.text import printable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from meft_reports.check import CheckResult

EXAMPLES = """\
examples:
  meft-report page runs/quickstart.jsonl -o report.html
  meft-report frame runs/quickstart.jsonl -o cells.parquet
  meft-report plot memory_depth runs/*.jsonl -o depth.svg
  meft-report table results runs/quickstart.jsonl
  meft-report table results runs/quickstart.jsonl -o results.tex
  meft-report baseline runs/gate.jsonl -o benchmarks/baselines/gate.jsonl
  meft-report check runs/gate.jsonl --baseline benchmarks/baselines/gate.jsonl \\
      --fail-on saved:0 --fail-on peak_allocated:2% --fail-on step_seconds:20%

exit codes:
  0 fine   1 regression   3 not comparable   4 a cell failed
  2 usage, or a file that cannot be read or written   70 a bug of meft-report
"""

MESSAGE_LENGTH = 10_000
"""Maximum number of characters of an error message."""
EXIT_MISTAKE = 2
CHECKS = ("checks.jsonl", "checks.jsonl.gz")
"""How the name of a file of checks ends."""
PAGES = (".html", ".htm")
"""How the name of a page ends."""
EXIT_BUG = 70


class ReportParser(argparse.ArgumentParser):
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
        """Return the first unknown option with the nearest valid one, as text."""
        options = [*self._option_string_actions]
        for word in self._words:
            name = word.partition("=")[0]
            if (
                name.startswith("-")
                and name.strip("-.0123456789")
                and (name not in options)
            ):
                return f"; {UnknownName('option', name, options)}"
        return ""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message}{self._misspelt()}\n")

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help; argparse itself hides that it could not be printed."""
        try:
            _say(self.format_help().rstrip("\n"))
        except ReportError as error:
            self.exit(_mistake(self.prog, error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        return _run(argv)
    finally:
        # Any code may have written to stderr, for example a warning of a library.
        try:
            sys.stderr.flush()
        except OSError:
            _discard(sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as after `2>&-`
            setattr(sys, name, Path(os.devnull).open("w"))
        elif isinstance(stream, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks are escaped.
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        # argparse would list the commands; the nearest one is more helpful.
        return _mistake("meft-report", UnknownName("command", words[0], COMMANDS))
    arguments = parser().parse_args(words)
    where = f"meft-report {arguments.command}"
    try:
        _refuse_checks(arguments)
        if getattr(arguments, "output", None) is not None:
            _refuse_to_overwrite(arguments.runs, arguments.output)
        return COMMANDS[arguments.command](arguments)
    except ReportError as error:
        return _mistake(where, error)
    except ModuleNotFoundError as error:
        return _mistake(where, f"{error}; install it with pip install 'meft[report]'")
    except OSError as error:
        return _mistake(where, error)
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()
            print(
                f"{where}: the error above is a bug of meft-report and no verdict on "
                "the records; please report it with the records",
                file=sys.stderr,
            )
        return EXIT_BUG


def frame(arguments: argparse.Namespace) -> int:
    """Write the tidy table."""
    from meft_reports.frame import read_frame
    from meft_reports.frame_files import save_frame

    save_frame(read_frame(arguments.runs), arguments.output)
    return _written(arguments.output)


def plot(arguments: argparse.Namespace) -> int:
    """Write one figure."""
    name = arguments.output.suffix.removeprefix(".")
    if name not in ("png", "svg", "pdf"):
        raise UnknownName("ending", arguments.output.suffix, (".png", ".svg", ".pdf"))
    its = find_plot(arguments.name)

    from meft_reports.frame import read_frame
    from meft_reports.plots.canvas import render

    write_atomically(
        arguments.output, render(its.draw(read_frame(arguments.runs)), name)
    )
    return _written(arguments.output)


def table(arguments: argparse.Namespace) -> int:
    """Print tables as Markdown, or write them in the format of the ending."""
    maker = find_maker(arguments.name)

    from meft_reports import published
    from meft_reports.frame import read_frame
    from meft_reports.table_formats import FORMATS
    from meft_reports.table_formats.markdown import to_markdown

    output = arguments.output
    if output is not None and output.suffix not in FORMATS:
        raise UnknownName("ending", output.suffix, FORMATS)
    records, checks = _split_checks(arguments.runs)
    some = published.tables(published.read(checks))
    if records:
        some += maker.make(read_frame(records))
    needs = maker.NEEDS if records else published.NEEDS
    nothing = f"No table: `{arguments.name}` needs {needs}."
    if output is None:
        _say(to_markdown(some) if some else nothing)
        return 0
    if not some:
        raise ReportError(nothing)
    write_atomically(output, FORMATS[output.suffix](some))
    return _written(output)


def page(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from meft_reports import published
    from meft_reports.aliases import with_aliases
    from meft_reports.frame import to_frame
    from meft_reports.page import render_page
    from meft_reports.page.timeline import read_timelines
    from meft_reports.records import breakdowns_of, read_records

    _check_page(arguments.output)
    runs, checks = _split_checks(arguments.runs)
    if not runs:
        raise ReportError("a page needs a file of records; files of checks add to it")
    records, newest = read_records(runs)
    frame = to_frame(with_aliases(records), newest)
    breakdowns = breakdowns_of(records)
    del records  # of a large run, most of the memory
    timelines = read_timelines(arguments.timeline)
    numbers = published.read(checks)
    content = render_page(frame, arguments.question, breakdowns, timelines, numbers)
    write_atomically(arguments.output, content)
    return _written(arguments.output)


def check(arguments: argparse.Namespace) -> int:
    """Compare with the baseline; the exit code is the verdict."""
    from meft_reports.threshold import parse_threshold

    arguments = settings.completed(arguments)
    thresholds = [parse_threshold(text) for text in arguments.fail_on]
    names = [(threshold.column.name, threshold.pattern) for threshold in thresholds]
    for name, pattern in names:
        if names.count((name, pattern)) > 1:
            of = f" of {pattern}" if pattern != "*" else ""
            raise ReportError(f"--fail-on is given twice for {name}{of}; keep one")

    held = arguments.baseline
    for path in arguments.runs:
        if path.exists() and held.exists() and path.samefile(held.resolve()):
            raise ReportError(f"{path} is both the run and the baseline")

    _refuse_to_write_over(arguments)

    from meft_reports.check import check as compare
    from meft_reports.formats import FORMATS
    from meft_reports.frame import to_frame
    from meft_reports.records import breakdowns_of, read_baseline, read_records

    before = read_baseline(arguments.baseline)
    after, newest = read_records(arguments.runs)
    result = compare(
        to_frame(after, newest),
        to_frame(before),
        thresholds,
        (breakdowns_of(before), breakdowns_of(after)),
        arguments.what_grew,
    )
    for name, path in arguments.write:
        write_atomically(path, FORMATS[name](result).encode())
    _say(str(result))
    if os.environ.get("GITHUB_ACTIONS") == "true" and not arguments.no_github:
        _tell_github(result)
    return result.exit_code


def _refuse_to_write_over(arguments: argparse.Namespace) -> None:
    """Refuse to write the verdict over a file that is read, or two into one."""
    outputs = [path.resolve() for _, path in arguments.write]
    read = [path.resolve() for path in (*arguments.runs, arguments.baseline)]
    for place, path in enumerate(outputs):
        if path in read:
            raise ReportError(
                f"--write: {path} is one of the files of records; write to another file"
            )
        if path in outputs[:place] and not path.is_char_device():
            raise ReportError(f"--write: {path} is given twice; write to two files")


def _tell_github(result: "CheckResult") -> None:
    """Print annotations, and add to the summary of the step."""
    from meft_reports.formats import github, markdown

    if lines := [*github.annotations(result)]:
        _say("\n".join(lines))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown.to_markdown(result))


def compare(arguments: argparse.Namespace) -> int:
    """Print two runs side by side, or write them as a page."""
    output = arguments.output
    if output is not None:
        _check_page(output)
        if arguments.all:
            raise ReportError(
                "--all lists everything as text, and a page does so anyway; leave out "
                "--all or -o"
            )

    from meft_reports.compare import compare as side_by_side
    from meft_reports.compare_text import to_text
    from meft_reports.pairing import find_fields
    from meft_reports.records import read_records

    ignored = find_fields(arguments.ignore)
    chosen = arguments.commits or (None, None)
    before, after = (
        read_records([path], commit)[0]
        for path, commit in zip(arguments.runs, chosen, strict=True)
    )
    found = side_by_side(
        before, after, ignored=ignored, num_changes=arguments.what_grew
    )
    if output is None:
        _say(to_text(found, shows_all=arguments.all))
        return 0

    from meft_reports.compare_page import render_page

    names = arguments.commits or _names(arguments.runs)
    write_atomically(output, render_page(found, tuple(names)))
    return _written(output)


def _names(paths: Sequence[Path]) -> tuple[str, str]:
    """Return short names of two files, which are not the same."""
    before, after = paths
    if before.name == after.name:
        return str(before), str(after)
    return before.name, after.name


def _check_page(path: Path) -> None:
    """Raise if a file does not end as a page does."""
    if path.suffix not in PAGES:
        raise UnknownName("ending", path.suffix, PAGES)


def history(arguments: argparse.Namespace) -> int:
    """Print a column over commits."""
    from meft_reports import plugin_lines
    from meft_reports.columns import find_measured
    from meft_reports.history import history as over_commits
    from meft_reports.pairing import find_fields
    from meft_reports.records import read_all

    column, ignored = find_measured(arguments.column), find_fields(arguments.ignore)
    records = []
    for path in arguments.runs:
        is_of_tests = plugin_lines.is_of_tests(path)
        records += plugin_lines.read(path) if is_of_tests else read_all([path])
    _say(over_commits(records, column, only=arguments.only, ignored=ignored))
    return 0


def baseline(arguments: argparse.Namespace) -> int:
    """Write the baseline and print the changes."""
    from meft_reports.baseline import update_baseline

    changes = update_baseline(
        arguments.runs,
        arguments.output,
        may_remove=arguments.remove,
        reason=arguments.reason,
    )
    _say("\n".join(changes))
    return _written(arguments.output)


COMMANDS = {
    "frame": frame,
    "plot": plot,
    "table": table,
    "page": page,
    "check": check,
    "baseline": baseline,
    "compare": compare,
    "history": history,
}


_COMMANDS = {
    "frame": "write one tidy table, a row per cell, as Parquet or CSV",
    "plot": "draw one figure as PNG, SVG or PDF",
    "table": "print tables as Markdown, or write them as LaTeX, CSV, Parquet or JSON",
    "page": "write one self-contained HTML page of the answer, figures and cells",
    "check": "compare with a baseline, cell by cell",
    "baseline": "write or update a baseline from ok cells; show what changes",
    "compare": "print two runs side by side: before, after, ratio, what grew; or "
    "write them as one self-contained HTML page",
    "history": "print a column over the commits of its records, with its steps",
}
"""What each command does."""
_OUTPUTS = {
    "frame": "out.parquet or out.csv",
    "plot": "out.png, out.svg or out.pdf",
    "page": "report.html",
    "baseline": "baseline.jsonl",
}
"""What commands write with `-o`, which they need."""
_PRINTED = {
    "table": "out.md, out.tex, out.csv, out.parquet or out.json; default: Markdown "
    "on stdout",
    "compare": "page.html; default: text on stdout",
}
"""What commands write with `-o`, and where they print without it."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = ReportParser(
        prog="meft-report",
        description="Tables, plots, one HTML page and a regression check from the "
        "records of meft-bench.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"meft {_version()}")
    commands = root.add_subparsers(
        dest="command", required=True, parser_class=ReportParser
    )
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        _add_runs(name, sub)
        if name in _ADD:
            _ADD[name](sub)
        if name in ("compare", "history"):
            sub.add_argument(
                "--ignore",
                action="append",
                default=[],
                metavar="FIELD",
                help="field of cells, such as attention, in which cells that are "
                "compared may differ; repeatable",
            )
    return root


def _add_runs(name: str, sub: argparse.ArgumentParser) -> None:
    """Add what a command reads and writes."""
    if name in ("plot", "table"):
        kinds = PLOTS if name == "plot" else TABLES
        sub.add_argument("name", metavar="NAME", help=", ".join(kinds))
    if name == "history":
        sub.add_argument("column", metavar="COLUMN", help="such as peak_allocated")
    sub.add_argument(
        "runs",
        metavar="RUNS" if name != "compare" else "RUN",
        nargs=2 if name == "compare" else "+",
        type=Path,
        help="files of records, .jsonl",
    )
    if name in _OUTPUTS:
        sub.add_argument(
            "-o", "--output", required=True, type=Path, help=_OUTPUTS[name]
        )
    if name in _PRINTED:
        sub.add_argument("-o", "--output", type=Path, help=_PRINTED[name])


def _add_baseline_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--remove",
        action="store_true",
        help="drop cells of the baseline that are not ok in the runs",
    )
    sub.add_argument(
        "--reason",
        default="",
        metavar="TEXT",
        help="why numbers change; it is kept in the cells that do",
    )


def _add_page_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--question",
        metavar="TEXT",
        help="title of the page; by default the question in the records",
    )
    sub.add_argument(
        "--timeline",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="moments of a step, which meft-bench plan writes; repeatable",
    )


def _add_history_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--only", default="*", metavar="PATTERN", help="cells, by their ids"
    )


def _add_compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--all", action="store_true", help="list everything, also what is equal"
    )
    sub.add_argument(
        "--commits",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="take the records of one commit of each file, which may be the same file",
    )
    sub.add_argument(
        "--what-grew",
        type=_number,
        default=3,
        metavar="N",
        help="how many changes of memory a difference lists; default 3",
    )


def _add_check_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="records to compare with; default: `baseline` of [tool.meft] in "
        "pyproject.toml",
    )
    sub.add_argument(
        "--fail-on",
        action="append",
        metavar="COLUMN:THRESHOLD[@PATTERN]",
        help="what may get worse by how much, e.g. saved:0, peak_allocated:5MiB, "
        "step_seconds:20%%, score:0.01; for some cells only: saved:1%%@sparse*; "
        "repeatable, the last that matches a cell holds; default: `fail_on` of "
        "[tool.meft]",
    )
    sub.add_argument(
        "--what-grew",
        type=_number,
        default=5,
        metavar="N",
        help="how many changes of memory a finding lists, largest first; default 5",
    )
    sub.add_argument(
        "--write",
        type=_format,
        action="append",
        default=[],
        metavar="FORMAT:FILE",
        help="write the verdict, too: text, markdown, json, junit, gha-benchmark, bmf; "
        "repeatable",
    )
    sub.add_argument(
        "--no-github",
        action="store_true",
        help="under GitHub Actions, write neither annotations nor a step summary",
    )


_ADD = {
    "baseline": _add_baseline_arguments,
    "check": _add_check_arguments,
    "compare": _add_compare_arguments,
    "history": _add_history_arguments,
    "page": _add_page_arguments,
}
"""Functions that add the options of a command."""


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, such as 5")
    return int(text)


def _format(text: str) -> tuple[str, Path]:
    """Parse `FORMAT:FILE` of `--write`."""
    from meft_reports.formats import FORMATS

    name, colon, file = text.partition(":")
    if not colon or not file:
        raise argparse.ArgumentTypeError(f"{text!r} should be FORMAT:FILE")
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(str(UnknownName("format", name, FORMATS)))
    return name, Path(file)


def _split_checks(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files of records, and those of checks."""
    checks = [path for path in paths if path.name.endswith(CHECKS)]
    return [path for path in paths if path not in checks], checks


def _refuse_checks(arguments: argparse.Namespace) -> None:
    """Refuse files of checks where records are expected."""
    is_table = arguments.command == "table" and arguments.name == "predictions"
    if is_table or arguments.command == "page":
        return
    for path in arguments.runs:
        if path.name.endswith(CHECKS):
            raise ReportError(
                f"{path} is a file of checks, which `table predictions` and `page` read"
                "; give the file of records next to it"
            )


def _refuse_to_overwrite(runs: Sequence[Path], output: Path) -> None:
    if output.suffix.lower() == ".gz":
        raise ReportError(
            f"{output}: outputs are not compressed; leave out .gz, and use `gzip`"
        )
    where = output.resolve()  # also through a folder that does not exist, as `x/../a`
    for path in runs:
        if path.exists() and where.exists() and path.samefile(where):
            raise ReportError(
                f"{output} is one of the files of records; write to another file"
            )


def _version() -> str:
    try:
        return importlib.metadata.version("meft")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout"


def _written(path: Path) -> int:
    _say(f"wrote {printable(str(path))}")
    return 0


def _say(text: str) -> None:
    """Print all of a text to stdout before the exit code is known.

    A reader that closes the pipe early is not an error.

    Raises:
        ReportError: stdout cannot be written to.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise ReportError(f"cannot write to stdout: {error.strerror}") from error


def _discard(stream: TextIO) -> None:
    # The rest of the buffer would fail again when Python exits, and change the exit
    # code.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _mistake(where: str, error: Exception | str) -> int:
    with contextlib.suppress(OSError):
        # One line, whatever the names in it are.
        print(f"{where}: {printable(str(error), MESSAGE_LENGTH)}", file=sys.stderr)
    return EXIT_MISTAKE
