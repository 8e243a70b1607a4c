"""A disk that is full, at any moment, and output that cannot be written."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from marks import slow_but_for
from meft_bench.parent import cli, runs
from meft_bench.parent.engines import environment, isolate
from meft_bench.parent.runs import RecordsFile, RunsError
from meft_bench.shared import outcome
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status

SWEEP = """
question = "Is anything lost?"
[[matrix]]
name = "one"
axes = { method = ["full", "head", "lora"] }
"""
NUM_CELLS = 3
LIMITED = """
import resource, sys
from meft_bench.parent.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:], worker_module="harness.workers.fake_leaves"))
"""
"""The harness, none of whose files may be longer than the first word says."""

RUN = ("run", "mine.toml", "--device", "cpu")
FILE = Path("runs", "mine.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a sweep of three cells, on a machine without a GPU."""
    (tmp_path / "mine.toml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "gpu_names", list)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    return tmp_path


@pytest.fixture
def record(here: Environment) -> Record:
    """A record like any other."""
    return Record(
        sweep="a sweep",
        cell=Cell(method="full"),
        status=Status.OK,
        message="",
        started_at="2025-01-01T00:00:00+00:00",
        wall_seconds=1.5,
        measurement=Measurement(saved_bytes=1, loss_curve=[0.1, 0.2]),
        environment=here,
    )


def ids(path: Path) -> list[str]:
    """The cells in a records file, of which every line must be whole."""
    assert path.read_bytes().endswith(b"\n")
    return [record.cell.id for record in runs.read(path)]


def run_limited(num_bytes: int) -> subprocess.CompletedProcess[str]:
    """A run whose files, and whose children's files, end at some length."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(num_bytes), *RUN],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("num_bytes", [0, 100, 6000])
def test_a_limit_is_met(folder: Path, num_bytes: int) -> None:
    """Before the child's outcome, at the first record, and in the middle of one.

    What is recorded is whole, no file is left empty, and the same command goes on when
    there is room again.
    """
    limited = run_limited(num_bytes)
    assert limited.returncode == 2
    said = limited.stderr.splitlines()[-1]
    assert said.startswith(f"meft-bench: {FILE}: File too large")
    assert "run the same command again" in said
    assert "Traceback" not in limited.stderr
    before = ids(FILE) if FILE.exists() else []
    assert (len(before) > 0) == (num_bytes == 6000)
    assert list((folder / "runs" / "mine.logs").glob("*.json*")) == []
    assert cli.main(list(RUN), worker_module="harness.workers.fake_ok") == 0
    after = ids(FILE)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == NUM_CELLS


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 KiB at `runs`; of the tests that may mount one."""
    place = folder / "runs"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` here")
    if done.returncode != 0:
        pytest.skip(f"may not mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_file_system_that_is_read_only(
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No cell starts, whether there is a records file or not."""
    journal = small_disk.parent / "journal"
    monkeypatch.setenv("FAKE_JOURNAL", str(journal))
    set_to = ["mount", "-o", "remount,ro", str(small_disk)]
    for words in ([], ["-o", "runs/new/mine.jsonl"]):
        subprocess.run(set_to, check=True)
        assert cli.main([*RUN, *words], worker_module="harness.workers.fake_ok") == 2
        said = capsys.readouterr().err
        assert said.startswith("meft-bench: runs/")
        assert "Read-only file system" in said
        assert said.count("\n") == 1
        assert not journal.exists()
        subprocess.run([*set_to[:2], "remount,rw", str(small_disk)], check=True)
        FILE.touch()


@pytest.mark.parametrize("num_free_pages", slow_but_for(range(8), 0, 2, 4))
def test_a_disk_is_full(
    small_disk: Path, num_free_pages: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """With any number of pages left, a run ends with the code of the docs and goes on
    when there is room again."""
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes((16 - num_free_pages) * 4096))
    code = cli.main(list(RUN), worker_module="harness.workers.fake_leaves")
    assert code in ((2,) if num_free_pages < 3 else (0, 2, 4))
    assert "Traceback" not in capfd.readouterr().err
    before = [r for r in runs.read(FILE) if r.status == Status.OK]
    assert not FILE.exists() or ids(FILE)
    ballast.unlink()
    assert cli.main(list(RUN), worker_module="harness.workers.fake_leaves") == 0
    after = [r for r in runs.read(FILE) if r.status == Status.OK]
    assert after[: len(before)] == before
    assert len({record.cell for record in after}) == len(after) == NUM_CELLS


def no_room(*_: object, **__: object) -> int:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["ftruncate", "pwrite", "fsync"])
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_record_is_added_whole_or_not_at_all(
    folder: Path,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    num_before: int,
) -> None:
    """Whichever of its calls fails; and a file that would be empty is not left."""
    with RecordsFile(FILE) as file:
        for _ in range(num_before):
            file.append(record)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_room)
            with pytest.raises(RunsError, match="No space left on device"):
                file.append(record)
    assert FILE.exists() == bool(num_before)
    assert runs.read(FILE) == [record] * num_before
    with RecordsFile(FILE) as file:
        file.append(record)
    assert runs.read(FILE) == [record] * (num_before + 1)


def test_a_short_write_goes_on(
    folder: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write may take a part of what it is given; the rest is written then."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, text, at: pwrite(f, text[:100], at))
    with RecordsFile(FILE) as file:
        file.append(record)
    assert runs.read(FILE) == [record]


@pytest.mark.parametrize("name", ["mkdir", "open"])
def test_the_start_fails(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """No room for the folder, for the records file, for the log of the first cell."""
    owner = os if name == "open" else Path
    monkeypatch.setattr(owner, name, no_room)
    assert cli.main(list(RUN), worker_module="harness.workers.fake_ok") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "No space left on device" in said[0]
    monkeypatch.undo()
    assert not FILE.exists()


def test_something_lies_where_logs_belong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file named like the folder of logs is said, and no records file is made."""
    (folder / "runs").mkdir()
    (folder / "runs" / "mine.logs").touch()
    assert cli.main(list(RUN), worker_module="harness.workers.fake_ok") == 2
    assert "runs/mine.logs: File exists" in capsys.readouterr().err
    assert not FILE.exists()


def test_a_file_system_that_takes_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Even root cannot make a file in /proc."""
    words = [*RUN, "-o", "/proc/mine.jsonl"]
    assert cli.main(words, worker_module="harness.workers.fake_ok") == 2
    said = capsys.readouterr().err
    assert said.startswith("meft-bench: /proc/mine.")
    assert said.count("\n") == 1


def test_two_runs_start_as_one_gives_up(
    folder: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second does not write to the file that the first took away as empty."""
    first = [RecordsFile(FILE)]
    opened = os.open

    def open_late(path: Path, flags: int, mode: int = 0o777) -> int:
        """Open the file, and let the first run end before it can be locked."""
        file = opened(path, flags, mode)
        while first:
            first.pop().close()
        return file

    monkeypatch.setattr(os, "open", open_late)
    with RecordsFile(FILE) as second:
        second.append(record)
    assert runs.read(FILE) == [record]


def test_an_outcome_that_cannot_be_left(folder: Path, here: Environment) -> None:
    """The parent says so, and what is free where, though the child could write neither
    a log nor an outcome."""
    record = isolate.run(
        Cell(method="full"),
        sweep="a sweep",
        environment=here,
        options=ChildOptions(),
        timeout_seconds=20.0,
        folder=folder,
        stop=threading.Event(),
        worker_module="harness.workers.fake_no_room",
    )
    assert record.status == Status.ERROR
    assert record.message.startswith("the child could not write its outcome: ")
    assert f"are free in {folder}" in record.message
    assert list(folder.glob("*.json*")) == []


def test_an_outcome_is_left_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half-written file remains."""
    out = folder / "out.json"
    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(OSError, match="No space left"):
        outcome.write(out, {"status": "ok"})
    monkeypatch.undo()
    assert list(folder.glob("out*")) == []
    outcome.write(out, {"status": "ok"})
    assert json.loads(out.read_text()) == {"status": "ok"}


def test_a_line_half_written_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `kill -9` or a loss of power, which may leave zeros behind."""
    assert cli.main(list(RUN), worker_module="harness.workers.fake_ok") == 0
    before = ids(FILE)
    for rest in (b'{"schema_version": 2, "cell_', b"\0" * 512):
        whole = FILE.read_bytes()
        FILE.write_bytes(whole + rest)
        capsys.readouterr()
        assert cli.main(list(RUN), worker_module="harness.workers.fake_ok") == 0
        said = capsys.readouterr().err.splitlines()
        assert said[0] == f"the last line of {FILE} is half written: left out"
        FILE.write_bytes(whole)
    assert ids(FILE) == before


def test_text_of_any_kind_is_recorded(folder: Path, record: Record) -> None:
    """A path of bytes that are no text reaches Python as lone surrogates."""
    odd = dataclasses.replace(record, message="no such file: \udcff in µ")
    with RecordsFile(FILE) as file:
        file.append(odd)
    assert runs.read(FILE) == [odd]


COMMANDS = {
    "list": ["list", "mine.toml", "--device", "cpu"],
    "show": ["show", "full", str(FILE)],
    "doctor": ["doctor"],
    "help": ["run", "--help"],
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_output_is_not_read(folder: Path, record: Record, command: str) -> None:
    """As of `meft-bench list | head -0`: no traceback, and the code of the docs."""
    with RecordsFile(FILE) as file:
        file.append(record)
    ended = run_with_closed("stdout", COMMANDS[command])
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_nowhere_to_write_the_output(
    folder: Path, record: Record, command: str
) -> None:
    """As of `meft-bench show ... > file` on a full disk: not the code of success."""
    with RecordsFile(FILE) as file:
        file.append(record)
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "meft_bench", *COMMANDS[command]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 2
    assert ended.stderr == "meft-bench: output: No space left on device\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_does_not_need_a_reader(folder: Path, name: str) -> None:
    """Its records are what it is for: it goes on, and its code is of its cells."""
    ended = run_with_closed(name, list(RUN), worker="fake_ok")
    assert ended.returncode == 0
    assert "Traceback" not in (ended.stderr or "")
    assert len(ids(FILE)) == NUM_CELLS
    ended = run_with_closed(name, [*RUN, "--force"], worker="fake_mixed")
    assert ended.returncode == 4
    assert len(ids(FILE)) == 2 * NUM_CELLS


def run_with_closed(
    name: str, words: list[str], worker: str = "fake_ok"
) -> subprocess.CompletedProcess[str]:
    """Run the harness while the reading end of its stdout or stderr is closed."""
    ours, theirs = os.pipe()
    os.close(ours)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {name: theirs}
    command = [sys.executable, "-P", "-m", "harness.workers.parent", worker, *words]
    try:
        return subprocess.run(command, text=True, timeout=60, **streams)  # type: ignore[call-overload, no-any-return]
    finally:
        os.close(theirs)
