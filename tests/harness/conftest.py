import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import meft_bench
from meft_bench.parent.engines import environment
from meft_bench.shared.record import Environment

TESTS = Path(__file__).parents[1]
SWEEP = """
question = "Does the command follow its arguments?"
[[matrix]]
name = "one"
axes = { method = ["full", "head", "lora", "meft1", "meft1-store"] }
"""


@pytest.fixture(autouse=True)
def find_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every process that a test starts find the harness and the fake children."""
    package = Path(meft_bench.__file__).parents[1]
    places = [str(TESTS), str(package), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))


@pytest.fixture(autouse=True)
def tokens_of_a_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Let no test find, or leave, tokens on disk that are not its own."""
    place = tmp_path_factory.mktemp("tokens")
    monkeypatch.setenv("MEFT_TOKEN_CACHE", str(place))
    return place


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What it frees, and when, depends on the tests before."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def here() -> Environment:
    """An environment that no machine has."""
    return Environment(
        versions={"torch": "2.13.0"},
        commit="c0ffee",
        dirty=False,
        code_sha256="5eed",
        machine="a machine, 2 cores",
        platform="Linux",
        cpu="a processor",
        num_threads=1,
        num_slots=1,
    )


@pytest.fixture
def start_parent() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the harness as a process: `start_parent(worker, *words, cwd=folder)`.

    What it prints goes to `output` if that is given: a pipe that nobody reads is full
    after a thousand cells, and the harness waits for room.
    """
    started = []

    def start(
        worker: str, *words: str, cwd: Path, output: Path | None = None
    ) -> subprocess.Popen[str]:
        with contextlib.ExitStack() as stack:
            there: Any = subprocess.PIPE
            if output is not None:
                there = stack.enter_context(output.open("a"))
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "harness.workers.parent", worker, *words],
                cwd=cwd,
                stdout=there,
                stderr=there,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that other processes bring about; fail after a minute."""

    def wait(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < deadline, "waited for a minute"
            time.sleep(0.01)

    return wait


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Whether a process runs; one that only waits to be reaped does not."""

    def look(pid: int) -> bool:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return fields.rpartition(")")[2].split()[0] not in "ZX"

    return look


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with one sweep in it, on a machine without a GPU."""
    (tmp_path / "mine.toml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEFT_DATA_DIR", raising=False)
    monkeypatch.setattr(environment, "gpu_names", list)
    return tmp_path
