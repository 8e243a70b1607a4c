"""Children that are forked from one process with all imports done."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent import cli, runs
from meft_bench.parent.engines import child_process, forks, isolate
from meft_bench.parent.engines.children import Children
from meft_bench.parent.engines.forks import ForkServer
from meft_bench.parent.harness import RunPlan
from meft_bench.shared import request
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status

pytestmark = pytest.mark.skipif(
    not forks.is_available(), reason="children are forked on Linux only"
)

TIMES = (
    *("step_seconds", "step_seconds_iqr", "all_step_seconds"),
    *("reference_step_seconds", "step_ratio", "step_ratio_iqr"),
)
SWEEP = """
question = "Are forks the same?"
[[matrix]]
name = "all"
defaults = {backbone = "random:bert-tiny", batch_size = 2, seq_len = 8, max_steps = 3}
axes = {method = ["full", "lora", "meft1-exact", "sparse-experts"]}
[[matrix]]
name = "predicted"
defaults = {backbone = "random:bert-tiny", batch_size = 2, seq_len = 8, max_steps = 3}
axes = {method = ["full", "meft1-exact"], device = ["virtual-H200"]}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[str], ForkServer]]:
    """Make servers whose children are fake; they end with the test."""
    servers = []

    def make(worker: str) -> ForkServer:
        module = f"harness.workers.{worker}"
        servers.append(ForkServer(os.environ, tmp_path / "imports.log", module))
        return servers[-1]

    yield make
    for one in servers:
        one.close()


def run_cell(
    server: ForkServer, folder: Path, here: Environment, worker: str, **changes: Any
) -> Record:
    given: dict[str, Any] = {
        "sweep": "a sweep",
        "environment": here,
        "options": ChildOptions(),
        "timeout_seconds": 60.0,
        "folder": folder,
        "stop": threading.Event(),
        "worker_module": f"harness.workers.{worker}",
        "start_child": server.run,
    }
    return isolate.run(Cell(method="full"), **{**given, **changes})


def test_a_record_says_that_its_child_was_forked(
    server: Callable[[str], ForkServer], tmp_path: Path, here: Environment
) -> None:
    record = run_cell(server("fake_ok"), tmp_path, here, "fake_ok")
    assert record.status == Status.OK
    assert record.environment.is_forked
    fresh = run_cell(
        server("fake_ok"), tmp_path, here, "fake_ok", start_child=child_process.run
    )
    assert not fresh.environment.is_forked


@pytest.mark.parametrize("worker", ["fake_killed", "fake_aborts", "fake_raises"])
def test_the_end_of_a_child_takes_nothing_along(
    server: Callable[[str], ForkServer], tmp_path: Path, here: Environment, worker: str
) -> None:
    """The same server goes on, with the next child in a new process."""
    its = server(worker)
    first, second = (run_cell(its, tmp_path, here, worker) for _ in range(2))
    assert first.status == second.status != Status.OK
    assert its._num_children == 2
    assert its._server is not None
    assert not its._server.ended.is_set()


def test_children_run_side_by_side(
    server: Callable[[str], ForkServer],
    tmp_path: Path,
    here: Environment,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each request is answered for its own child."""
    its = server("fake_ok")
    found: list[Record] = []

    def run_one(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(run_cell(its, folder, here, "fake_ok"))

    threads = [threading.Thread(target=run_one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.status for record in found] == [Status.OK] * 8


def test_without_the_server_there_is_a_new_one(
    server: Callable[[str], ForkServer],
    tmp_path: Path,
    here: Environment,
    monkeypatch: pytest.MonkeyPatch,
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    """Children of one that was killed end with it, and are recorded as killed."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    its = server("fake_hangs")
    found: list[Record] = []
    thread = threading.Thread(
        target=lambda: found.append(run_cell(its, tmp_path, here, "fake_hangs"))
    )
    thread.start()
    wait_until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    child, grandchild = map(int, pids.read_text().split())
    assert its._server is not None
    its._server.kill()
    thread.join()
    assert [record.status for record in found] == [Status.KILLED]
    assert "`--fresh`" in found[0].message
    wait_until(lambda: not is_running(child))
    os.kill(grandchild, signal.SIGKILL)
    record = run_cell(its, tmp_path, here, "fake_hangs", timeout_seconds=0.5)
    assert record.status == Status.TIMEOUT


def plan(path: Path, **changes: Any) -> RunPlan:
    given: dict[str, Any] = {
        "sweep": "a",
        "question": "?",
        "caveats": (),
        "cells": (),
        "path": path,
        "options": ChildOptions(),
        "num_slots": 1,
        "timeout_seconds": 1.0,
        "force": False,
    }
    return RunPlan(**given | changes)


def test_which_children_are_forked(tmp_path: Path) -> None:
    """None on a real GPU, and none with `--fresh`."""

    def starters(**changes: Any) -> list[bool]:
        options = ChildOptions()
        with Children(options, tmp_path, request.WORKER, **changes) as children:
            return [
                children.starter(device) is not child_process.run
                for device in ("cpu", "virtual-H200", "cuda")
            ]

    assert starters() == [True, True, False]
    assert starters(fresh=True) == [False, False, False]


@pytest.mark.slow
def test_numbers_of_forked_and_of_fresh_children_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number but times and the memory of the process, every byte of the peak."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SWEEP)
    found = []
    for name, words in (("forked", []), ("fresh", ["--fresh"])):
        command = ["run", "mine.toml", "--device", "cpu", "--threads", "1"]
        assert cli.main([*command, "-o", f"{name}.jsonl", *words]) == 0
        found.append({r.cell: r for r in runs.read(Path(f"{name}.jsonl"))})
    forked, fresh = found
    assert forked.keys() == fresh.keys()
    for cell, one in forked.items():
        other = fresh[cell]
        assert one.environment == replace(other.environment, is_forked=True)
        assert one.memory_breakdown == other.memory_breakdown
        numbers = [record.measurement.to_json() for record in (one, other)]
        for its in numbers:
            for name in (*TIMES, "peak_host_bytes"):
                its.pop(name)
        assert json.dumps(numbers[0]) == json.dumps(numbers[1])
