import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from marks import slow_but_for
from meft_bench.parent import runs
from meft_bench.shared.record import Status

SWEEP = """
question = "Is anything lost or done twice?"
[[matrix]]
name = "one"
axes = { method = ["full", "head", "lora", "meft1"], seed = [0, 1] }
"""
NUM_CELLS = 8
PATIENCE = 120
"""Seconds that a run of all cells may take where tests share a busy machine."""

Start = Callable[..., subprocess.Popen[str]]
WaitUntil = Callable[[Callable[[], bool]], None]


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which every child writes its process number and its cell."""
    (tmp_path / "mine.toml").write_text(SWEEP)
    path = tmp_path / "journal"
    path.touch()
    monkeypatch.setenv("FAKE_JOURNAL", str(path))
    return path


def started(journal: Path) -> list[tuple[int, str]]:
    """Process and cell of every child that was started."""
    return [tuple(json.loads(line)) for line in journal.read_text().splitlines()]


def recorded(folder: Path) -> list[str]:
    """Ids of the cells in the records file, in order."""
    return [record.cell.id for record in runs.read(folder / "runs" / "mine.jsonl")]


def test_kill_nine(
    start_parent: Start,
    journal: Path,
    tmp_path: Path,
    wait_until: WaitUntil,
    is_running: Callable[[int], bool],
) -> None:
    """After `kill -9` nothing is lost, and a rerun repeats nothing."""
    words = ("run", "mine.toml", "--device", "cpu", "--slots", "2")
    parent = start_parent("fake_slow", *words, cwd=tmp_path)
    # Two are recorded and two more have begun: the parent dies with its hands full.
    wait_until(lambda: len(recorded(tmp_path)) >= 2 and len(started(journal)) >= 4)
    parent.kill()
    parent.wait()
    first = started(journal)
    wait_until(lambda: not any(is_running(pid) for pid, _ in first))
    before = recorded(tmp_path)
    assert 2 <= len(before) < NUM_CELLS

    again = start_parent("fake_slow", *words, cwd=tmp_path)
    stdout, stderr = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, stderr
    assert f"ok {NUM_CELLS}" in stdout
    after = recorded(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == NUM_CELLS
    second = [cell for _, cell in started(journal)[len(first) :]]
    assert sorted(second) == sorted(set(after) - set(before))

    third = start_parent("fake_slow", *words, cwd=tmp_path)
    assert third.communicate(timeout=PATIENCE)[0] == stdout
    assert recorded(tmp_path) == after


def test_no_orphan(
    start_parent: Start,
    journal: Path,
    tmp_path: Path,
    wait_until: WaitUntil,
    is_running: Callable[[int], bool],
) -> None:
    """Children that would never end by themselves end with a parent that is killed."""
    words = ("run", "mine.toml", "--device", "cpu", "--slots", "2")
    parent = start_parent("fake_sleeps", *words, cwd=tmp_path)
    wait_until(lambda: len(started(journal)) == 2)
    pids = [pid for pid, _ in started(journal)]
    assert all(is_running(pid) for pid in pids)
    parent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.parametrize(
    "number", slow_but_for([signal.SIGINT, signal.SIGTERM], signal.SIGINT)
)
def test_interrupt(
    start_parent: Start,
    journal: Path,
    tmp_path: Path,
    wait_until: WaitUntil,
    is_running: Callable[[int], bool],
    number: signal.Signals,
) -> None:
    """An interrupted run keeps what is recorded, kills the rest, and says so."""
    words = ("run", "mine.toml", "--device", "cpu")
    parent = start_parent("fake_slow", *words, cwd=tmp_path)
    wait_until(lambda: len(recorded(tmp_path)) >= 1 and len(started(journal)) >= 2)
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 130
    assert not any(is_running(pid) for pid, _ in started(journal))
    before = recorded(tmp_path)
    assert 1 <= len(before) < NUM_CELLS
    assert stderr.splitlines()[-1] == (
        f"interrupted: {len(before)} of {NUM_CELLS} cells are recorded in "
        "runs/mine.jsonl; run the same command again to go on"
    )
    again = start_parent("fake_slow", *words, cwd=tmp_path)
    again.communicate(timeout=PATIENCE)
    assert again.returncode == 0
    after = recorded(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == NUM_CELLS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_of_a_check(
    start_parent: Start,
    tmp_path: Path,
    wait_until: WaitUntil,
    number: signal.Signals,
) -> None:
    """It is not recorded, no cell runs, and the run says how to go on."""
    text = SWEEP.replace("[[matrix]]", 'checks = ["card"]\n[[matrix]]')
    (tmp_path / "mine.toml").write_text(text)
    words = ("run", "mine.toml", "--device", "virtual-H200")
    parent = start_parent("fake_ok", *words, cwd=tmp_path)
    log = tmp_path / "runs" / "mine.logs" / "check-card-virtual-H200.log"
    wait_until(log.exists)
    parent.send_signal(number)
    _, stderr = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 130
    assert stderr.splitlines()[-1] == (
        f"interrupted: 0 of {NUM_CELLS} cells are recorded in runs/mine.jsonl; run the "
        "same command again to go on"
    )
    assert recorded(tmp_path) == []
    assert not (tmp_path / "runs" / "mine.checks.jsonl").exists()


def test_second_run(
    start_parent: Start, journal: Path, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A run on a file that another run writes to is refused and disturbs nothing."""
    words = ("run", "mine.toml", "--device", "cpu")
    first = start_parent("fake_slow", *words, cwd=tmp_path)
    wait_until(lambda: len(started(journal)) >= 1)
    second = start_parent("fake_ok", *words, cwd=tmp_path)
    _, stderr = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert stderr.count("\n") == 1
    assert "another run is writing to it" in stderr
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0
    assert len(recorded(tmp_path)) == NUM_CELLS


def test_failures_run_again(start_parent: Start, journal: Path, tmp_path: Path) -> None:
    """Cells that failed or were skipped run again; those that are ok do not."""
    words = ("run", "mine.toml", "--device", "cpu", "--slots", "4")
    mixed = start_parent("fake_mixed", *words, cwd=tmp_path)
    stdout, _ = mixed.communicate(timeout=PATIENCE)
    assert mixed.returncode == 4
    assert stdout.splitlines()[0] == "ok 4, oom 2, skipped 2"
    fixed = start_parent("fake_ok", *words, cwd=tmp_path)
    stdout, _ = fixed.communicate(timeout=PATIENCE)
    assert fixed.returncode == 0
    assert stdout.splitlines()[0] == f"ok {NUM_CELLS}"
    again = [cell.partition("/")[0] for _, cell in started(journal)[NUM_CELLS:]]
    assert sorted(again) == ["head", "head", "lora", "lora"]
    last = {r.cell: r.status for r in runs.read(tmp_path / "runs" / "mine.jsonl")}
    assert set(last.values()) == {Status.OK}
