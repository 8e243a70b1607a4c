"""An exit code is a verdict only where `check` has come to one."""

import errno
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from marks import slow_but_for
from meft_reports import cli as command_line
from meft_reports.cli import EXIT_BUG, EXIT_MISTAKE, main
from reporting.kinds import MakeRecord, Write

VERDICTS = {0, 1, 3, 4}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(make_record: MakeRecord, write: Write) -> Path:
    """A run of two cells."""
    return write([make_record(seed=0), make_record(seed=1)])


@pytest.fixture
def commands(run: Path, make_record: MakeRecord, write: Write) -> dict[str, list[str]]:
    """Every command, by its name, as it ends with 0."""
    baseline = write([make_record(seed=0), make_record(seed=1)], "baseline.jsonl")
    folder = run.parent
    return {
        "frame": ["frame", f"{run}", "-o", f"{folder / 'cells.csv'}"],
        "plot": ["plot", "score_memory", f"{run}", "-o", f"{folder / 'plot.svg'}"],
        "table": ["table", "results", f"{run}"],
        "page": ["page", f"{run}", "-o", f"{folder / 'page.html'}"],
        "baseline": ["baseline", f"{run}", "-o", f"{folder / 'new.jsonl'}"],
        "check": [
            *["check", f"{run}", "--baseline", f"{baseline}"],
            *["--fail-on", "saved:0"],
        ],
        "compare": ["compare", f"{baseline}", f"{run}"],
        "history": ["history", "saved", f"{run}"],
    }


@pytest.mark.parametrize("name", command_line.COMMANDS)
@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), AssertionError(), MemoryError()]
)
def test_a_bug_of_ours_has_a_code_of_its_own(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    commands: dict[str, list[str]],
    name: str,
    error: Exception,
) -> None:
    """Not that of a regression, which Python itself would exit with."""

    def fail(_arguments: Any) -> NoReturn:
        raise error

    monkeypatch.setitem(command_line.COMMANDS, name, fail)
    assert main(commands[name]) == EXIT_BUG
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "is a bug of meft-report and no verdict" in errors


def test_codes_that_are_no_verdict_are_none() -> None:
    """And every code is documented, in `--help` and in the README."""
    assert not {EXIT_BUG, EXIT_MISTAKE} & VERDICTS
    documents = [command_line.EXAMPLES, (ROOT / "reports/README.md").read_text()]
    for document in documents:
        codes = document.partition("xit code")[2]
        for code in {EXIT_BUG, EXIT_MISTAKE} | VERDICTS:
            assert re.search(rf"\b{code}\b", codes), (code, document[:20])


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_what_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    commands: dict[str, list[str]],
    name: str,
) -> None:
    """With the extra that brings it; one line, and no verdict."""

    def fail(_arguments: Any) -> NoReturn:
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setitem(command_line.COMMANDS, name, fail)
    assert main(commands[name]) == EXIT_MISTAKE
    assert capsys.readouterr().err == (
        f"meft-report {name}: No module named 'pandas'; install it with pip install "
        "'meft[report]'\n"
    )


WRITERS = ("frame", "plot", "page", "baseline")


@pytest.mark.parametrize("name", slow_but_for(WRITERS, "frame", "baseline"))
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_what_was_there(
    commands: dict[str, list[str]], name: str, exists: bool
) -> None:
    """Real writes that fail half-way: the old file or none, and no other file."""
    output = Path(commands[name][-1])
    if exists:
        output.write_text("" if name == "baseline" else "old")
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    done = _run(commands[name], preexec_fn=_no_room)
    assert done.returncode == EXIT_MISTAKE, done.stderr
    assert f"cannot write {output}: File too large" in done.stderr
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before


def _no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))


def _run(
    argv: list[str], preexec_fn: Callable[[], None] | None = None, **streams: Any
) -> "subprocess.CompletedProcess[str]":
    if not streams:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(
        [sys.executable, "-m", "meft_reports", *argv],
        text=True,
        timeout=120,
        preexec_fn=preexec_fn,
        **streams,
    )


@pytest.mark.parametrize("step", ["fsync", "replace", "mkstemp"])
def test_no_room_at_any_moment_is_a_mistake(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    commands: dict[str, list[str]],
    step: str,
) -> None:
    """At the start, while writing and at the very end; nothing half-written is left."""

    def fail(*_args: Any, **_named: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = Path(commands["baseline"][-1])
    before = sorted(output.parent.iterdir())
    module: Any = {"fsync": os, "mkstemp": "tempfile", "replace": Path}[step]
    if module == "tempfile":
        monkeypatch.setattr("tempfile.mkstemp", fail)
    else:
        monkeypatch.setattr(module, step, fail)
    assert main(commands["baseline"]) == EXIT_MISTAKE
    assert capsys.readouterr().err == (
        f"meft-report baseline: cannot write {output}: No space left on device\n"
    )
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["check", "table", "baseline"])
def test_stdout_without_room_is_a_mistake(
    commands: dict[str, list[str]], name: str
) -> None:
    """A verdict that could not be written down is none."""
    with Path("/dev/full").open("w") as full:
        done = _run(commands[name], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == EXIT_MISTAKE
    assert done.stderr == (
        f"meft-report {name}: cannot write to stdout: No space left on device\n"
    )


@pytest.mark.parametrize("words", [["--help"], ["check", "--help"]])
def test_help_without_room_is_a_mistake(words: list[str]) -> None:
    """As for every other text that cannot be read."""
    with Path("/dev/full").open("w") as full:
        done = _run(words, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == EXIT_MISTAKE
    name = " ".join(["meft-report", *words[:-1]])
    assert done.stderr == f"{name}: cannot write to stdout: No space left on device\n"


def test_stderr_without_room_changes_no_code(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """What went wrong cannot be said there, and is still no verdict."""
    torn = tmp_path / "run.jsonl"
    torn.write_text(torn.read_text() + "{")
    with Path("/dev/full").open("w") as full:
        noted = _run(commands["check"], stdout=subprocess.PIPE, stderr=full)
        absent = _run(["table", "results", "absent"], stdout=full, stderr=full)
    assert noted.returncode == 0
    assert absent.returncode == EXIT_MISTAKE


def test_a_closed_stderr_changes_neither_code_nor_stdout(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """Python prints to stdout where it has no stderr."""
    torn = tmp_path / "run.jsonl"
    torn.write_text(torn.read_text() + "{")
    noted = _run(
        commands["check"], preexec_fn=lambda: os.close(2), stdout=subprocess.PIPE
    )
    absent = _run(
        ["table", "results", "absent"],
        preexec_fn=lambda: os.close(2),
        stdout=subprocess.PIPE,
    )
    assert noted.returncode == 0
    assert noted.stdout.startswith("2 cells in the baseline")
    assert (absent.returncode, absent.stdout) == (EXIT_MISTAKE, "")


def test_a_reader_may_stop_reading(
    make_record: MakeRecord, write: Write, commands: dict[str, list[str]]
) -> None:
    """As `head` does: the verdict stays what it is, without a traceback."""
    records = [make_record(seed=seed) for seed in range(300)]
    write(records, "baseline.jsonl")
    write([record | {"status": "oom"} for record in records])
    read, send = os.pipe()
    os.close(read)
    done = _run(commands["check"], stdout=send, stderr=subprocess.PIPE)
    os.close(send)
    assert (done.returncode, done.stderr) == (4, "")


def test_a_terminal_that_lacks_a_letter_changes_no_code(
    make_record: MakeRecord, write: Write, commands: dict[str, list[str]]
) -> None:
    """It is escaped."""
    write([make_record("error", seed=seed, message="größer → ☃") for seed in (0, 1)])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "meft_reports", *commands["check"]],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (4, "")
    assert r"gr\xf6\xdfer \u2192 \u2603" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_a_mistake(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """Nothing is written elsewhere instead."""
    tmp_path.chmod(0o500)
    assert main(commands["baseline"]) == EXIT_MISTAKE
    tmp_path.chmod(0o700)


def test_a_pipe_is_written_to_and_not_replaced(
    commands: dict[str, list[str]], tmp_path: Path
) -> None:
    """A device or a pipe is no file whose place another could take."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    assert main([*commands["baseline"][:-1], str(pipe)]) == 0
    assert reader.communicate(timeout=60)[0].count("\n") == 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_is_followed(
    commands: dict[str, list[str]], tmp_path: Path, run: Path
) -> None:
    """The file it leads to is replaced, the link stays."""
    link, target = tmp_path / "link.jsonl", tmp_path / "target.jsonl"
    link.symlink_to(target)
    assert main([*commands["baseline"][:-1], str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text().count("\n") == 2


@pytest.mark.parametrize(
    "name", ["no\nsuch \x1b[31m.jsonl", "\udcff.jsonl", "x" * 5000]
)
def test_a_mistake_in_any_file_is_one_line(
    capsys: pytest.CaptureFixture[str],
    make_record: MakeRecord,
    write: Write,
    name: str,
) -> None:
    """Whatever the file is called."""
    assert main(["table", "failures", name]) == EXIT_MISTAKE
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors[:-1].isprintable()
