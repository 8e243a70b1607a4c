import errno
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent.engines import environment, forks, isolate
from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.forks import ForkServer
from meft_bench.shared import outcome
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status

CELL = Cell(method="meft1", batch_size=4, seed=3)
SEEN = Measurement(saved_bytes=2**20, step_seconds=1, loss_curve=[])


@pytest.fixture(params=["fresh", "forked"])
def run(
    request: pytest.FixtureRequest, tmp_path: Path, here: Environment
) -> Iterator[Callable[..., Record]]:
    """Run `CELL` with a fake child, in a new interpreter or in a fork."""
    if request.param == "forked" and not forks.is_available():
        pytest.skip("children are forked on Linux only")
    servers: list[ForkServer] = []

    def run_cell(worker: str, **changes: Any) -> Record:
        module = f"harness.workers.{worker}"
        arguments: dict[str, Any] = {
            "sweep": "a sweep",
            "environment": here,
            "options": ChildOptions(),
            "timeout_seconds": 20.0,
            "folder": tmp_path,
            "stop": threading.Event(),
            "worker_module": module,
        }
        if request.param == "forked":
            servers.append(ForkServer(os.environ, tmp_path / "log", module))
            arguments["start_child"] = servers[-1].run
        return isolate.run(CELL, **{**arguments, **changes})

    yield run_cell
    for server in servers:
        server.close()


def test_ok(run: Callable[..., Record], here: Environment) -> None:
    """A record holds the cell, what the child saw, and where, from both sides."""
    record = run("fake_ok", question="Why?", caveats=("Few rows.", "One seed."))
    assert (record.status, record.message) == (Status.OK, "")
    assert record.sweep_question == "Why?"
    assert record.sweep_caveats == "Few rows.\nOne seed."
    assert record.log_tail == ""
    assert (record.sweep, record.cell, record.measurement) == ("a sweep", CELL, SEEN)
    assert record.environment.device_name == "fake device"
    assert record.environment.num_threads == 3
    assert record.environment.code_sha256 == here.code_sha256
    assert 0 < record.wall_seconds < 20
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_raises(run: Callable[..., Record]) -> None:
    """A child that raises is an error, whose message is the last line it printed."""
    record = run("fake_raises")
    assert record.status == Status.ERROR
    assert record.message == "RuntimeError: the tokenizer is missing"
    assert record.log_tail is not None
    lines = record.log_tail.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == record.message
    assert record.measurement == Measurement()


def test_no_such_worker(run: Callable[..., Record]) -> None:
    """A child that cannot even be imported is an error like any other."""
    record = run("no_such_worker")
    assert record.status == Status.ERROR
    assert "no_such_worker" in record.message


def test_hangs(
    run: Callable[..., Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    """A child out of time is killed, and so is what it had started."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    record = run("fake_hangs", timeout_seconds=1.0)
    assert record.status == Status.TIMEOUT
    assert record.message == "still running after 1 s"
    child, grandchild = map(int, pids.read_text().split())
    wait_until(lambda: not is_running(child) and not is_running(grandchild))


def test_killed(run: Callable[..., Record]) -> None:
    """A child killed with SIGKILL says who may have done it."""
    record = run("fake_killed")
    assert record.status == Status.KILLED
    assert record.message.startswith("SIGKILL: the kernel does this")


def test_aborts(run: Callable[..., Record]) -> None:
    """The message for a child that any other signal ends is the signal's name."""
    record = run("fake_aborts")
    assert (record.status, record.message) == (Status.KILLED, "SIGABRT")


def test_out_of_memory(run: Callable[..., Record]) -> None:
    """A child reaches its memory limit; without the limit it does not."""
    limited = ChildOptions(memory_limit_bytes=2**27)
    record = run("fake_out_of_memory", options=limited)
    assert record.status == Status.OOM
    assert record.message == (
        "256 MiB were asked for and not given; the limit of host memory is 128 MiB"
    )
    assert run("fake_out_of_memory").status == Status.OK


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted on Linux only")
def test_processes_that_hold_too_much_together(
    run: Callable[..., Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    """None of them exceeds the limit by itself; all are killed, and the record says
    why."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    record = run("fake_many", options=ChildOptions(memory_limit_bytes=2**27))
    assert record.status == Status.OOM
    assert record.message == (
        "its processes held more than the limit of host memory, 128 MiB, and were "
        "killed"
    )
    its = [*map(int, pids.read_text().split())]
    assert len(its) == 4
    wait_until(lambda: not any(map(is_running, its)))


def test_a_clock_that_jumps(
    run: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By years, in both directions, while a cell runs: its duration and its time limit
    are those of a clock that cannot be set."""
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    jumps = itertools.cycle([-1e9, 1e9, 0.0])
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    ended = run("fake_slow")
    assert ended.status == Status.OK
    assert 0 < ended.wall_seconds < 20
    hung = run("fake_hangs", timeout_seconds=1.0)
    assert hung.status == Status.TIMEOUT
    assert 1 <= hung.wall_seconds < 20


def test_only_start_times_are_read_from_a_clock_that_can_be_set() -> None:
    """In the whole harness; and the age of what killed cells have left of tokens."""
    folder = environment.source_folders()["meft_bench"]
    users = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.now\(", path.read_text())
    }
    assert users == {
        "child/tasks/token_cache.py",
        "parent/checks.py",
        "parent/cli.py",
        "parent/engines/isolate.py",
        "parent/runs.py",
        "pytest_plugin/__init__.py",
    }


def test_garbage(run: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """A child whose outcome is no outcome is an error, not a crash of the parent."""
    monkeypatch.setenv("FAKE_OUTCOME", '{"status": "ok"')
    record = run("fake_garbage")
    assert record.status == Status.ERROR
    assert record.message.startswith("the child's outcome is malformed: Expecting ','")
    assert record.measurement == Measurement()


def test_silent(run: Callable[..., Record]) -> None:
    """A child that exits with 0 and wrote nothing did not do its work."""
    record = run("fake_silent")
    assert record.status == Status.ERROR
    assert record.message == "exited without an outcome: nothing to do"


def test_no_child(run: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be started, what could not be and why is said."""

    def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(
        "meft_bench.parent.engines.child_process.subprocess.Popen", no_process
    )
    with pytest.raises(OSError, match="no child could be started: Resource") as caught:
        run("fake_ok")
    assert caught.value.filename == sys.executable


def test_mute(run: Callable[..., Record]) -> None:
    """The message for a child that prints nothing is its exit status."""
    record = run("fake_mute")
    assert record.status == Status.ERROR
    assert record.message == "exit status 3, and an empty log"


def test_noisy(run: Callable[..., Record], tmp_path: Path) -> None:
    """What a child prints is kept and never taken for its outcome."""
    assert run("fake_noisy").status == Status.OK
    assert b"not me" in isolate.log_path(tmp_path, CELL).read_bytes()


def test_falls_late(run: Callable[..., Record]) -> None:
    """Work that was finished and written down counts, however the child then died."""
    record = run("fake_falls_late")
    assert (record.status, record.measurement) == (Status.OK, SEEN)


def test_stale_outcome(run: Callable[..., Record], tmp_path: Path) -> None:
    """An outcome left by an earlier child is never taken for this one's."""
    stale = isolate.log_path(tmp_path, CELL).with_suffix(".json")
    stale.write_text(json.dumps(OUTCOME))
    assert run("fake_silent").status == Status.ERROR


def test_stopped(run: Callable[..., Record], tmp_path: Path) -> None:
    """A stopped run raises before the next child starts."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run("fake_ok", stop=stop)
    assert list(tmp_path.iterdir()) == []


def test_child_environment(
    run: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child is offline and seeded, has the given threads, and knows its options."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    options = ChildOptions(data_dir="/data", num_threads=2)
    variables = isolate.child_environment(options, "cpu")
    expected = {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert expected.items() <= variables.items()
    assert variables["PATH"] == os.environ["PATH"]
    online = isolate.child_environment(ChildOptions(allow_download=True), "cuda")
    assert "HF_HUB_OFFLINE" not in online
    assert online.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    one = isolate.child_environment(options, "cuda", "GPU-aaaa")
    assert one["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
    virtual = isolate.child_environment(options, "virtual-H200")
    assert virtual["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(isolate, "_MESSAGE_LENGTH", 10**6)
    record = run("fake_echo", options=options)
    assert record.status == Status.SKIPPED
    seen_variables, seen_options = json.loads(record.message)
    assert expected.items() <= seen_variables.items()
    its = {name: seen_options.pop(name) for name in list(seen_options)[3:6]}
    assert [*its] == ["checkpoint", "checkpoint_identity", "checkpoint_seconds"]
    assert its["checkpoint"].endswith(".checkpoint")
    assert seen_options == {
        "data_dir": "/data",
        "allow_download": False,
        "num_threads": 2,
        "save_to": None,
        "memory_limit_bytes": None,
    }


OUTCOME: dict[str, Any] = {
    "status": "ok",
    "message": "",
    "measurement": {"saved_bytes": 5, "step_seconds": 2, "loss_curve": [0.5, 1]},
    "environment": {"weights_origin": None, "num_threads": 2},
    "memory_breakdown": None,
}


def test_outcome(tmp_path: Path) -> None:
    """An outcome is read as it was written; an integer may stand for a float."""
    path = tmp_path / "outcome.json"
    path.write_text(json.dumps(OUTCOME))
    seen = outcome.read(path)
    assert (seen.status, seen.environment) == (Status.OK, OUTCOME["environment"])
    assert seen.measurement == Measurement(**OUTCOME["measurement"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff\xff\xff", "codec can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "expected an object of"),
        (b'{"status": "ok"}', "expected an object of"),
    ],
)
def test_outcome_form(tmp_path: Path, text: bytes, reason: str) -> None:
    """A file that is not a JSON object of the four keys is refused with a reason."""
    path = tmp_path / "outcome.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        outcome.read(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("status", "timeout", "'timeout' is not a child's to give"),
        ("status", [], "is not a child's to give"),
        ("message", None, "`message` is not text"),
        ("measurement", [], "`measurement` is not an object"),
        ("measurement", {"saved": 1}, "unknown field 'saved'"),
        ("measurement", {"saved_bytes": 1.5}, "`measurement.saved_bytes` = 1.5"),
        ("measurement", {"saved_bytes": True}, "`measurement.saved_bytes` = True"),
        ("measurement", {"loss_curve": ["a"]}, "`measurement.loss_curve`"),
        ("memory_breakdown", {"rows": []}, "has the fields peak_bytes"),
        ("environment", {"machine": "mine"}, "unknown field 'machine'"),
        ("environment", {"num_threads": None}, "`environment.num_threads`"),
    ],
)
def test_outcome_fields(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    """A field that a record has no place for is named."""
    path = tmp_path / "outcome.json"
    path.write_text(json.dumps({**OUTCOME, key: value}))
    with pytest.raises(ValueError, match=re.escape(reason)):
        outcome.read(path)
