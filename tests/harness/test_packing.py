"""Cells that share a GPU, by what is predicted for each; the GPUs do not exist."""

import contextlib
import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent import cli, harness, runs
from meft_bench.parent.engines import environment, host_memory, packing
from meft_bench.parent.engines.child_process import Stopped
from meft_bench.parent.engines.environment import PhysicalGpu
from meft_bench.parent.engines.gpus import Gpus, Share
from meft_bench.parent.engines.job import Job
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Record

H100 = "NVIDIA H100 80GB HBM3"
ONE = [PhysicalGpu(uuid="GPU-aaaa", model="A", free_bytes=100)]
TWO = [*ONE, PhysicalGpu(uuid="GPU-bbbb", model="B", free_bytes=50)]
SWEEP = """
question = "Which cells share?"
[[matrix]]
name = "one"
defaults = { device = "cuda" }
axes = { method = ["full", "head", "lora", "meft1"], seed = [0, 1] }
"""


def never() -> threading.Event:
    return threading.Event()


def try_one(gpus: Gpus, needs: dict[str, int]) -> Share | None:
    """A share of a GPU, if there is room at once."""
    stop = threading.Event()
    stop.set()
    with contextlib.suppress(Stopped), gpus.with_room(needs, stop) as share:
        return share
    return None


def test_cells_share_a_gpu_while_their_bytes_fit() -> None:
    """And the next one waits; whoever was not alone is marked as such."""
    gpus = Gpus(ONE)
    with gpus.with_room({"A": 60}, never()) as first:
        assert not first.is_shared
        with gpus.with_room({"A": 40}, never()) as second:
            assert first.is_shared
            assert second.is_shared
            assert try_one(gpus, {"A": 1}) is None
        assert try_one(gpus, {"A": 41}) is None
        assert try_one(gpus, {"A": 40}) is not None
    with gpus.with_room({"A": 60}, never()) as third:
        assert not third.is_shared


def test_a_cell_without_a_prediction_is_alone() -> None:
    """Nobody joins it, and it joins nobody, also where it is larger than a GPU."""
    gpus = Gpus(ONE)
    for needs in ({}, {"B": 1}, {"A": 101}):
        with gpus.with_room(needs, never()) as share:
            assert try_one(gpus, {"A": 1}) is None
            assert not share.is_shared
    with gpus.with_room({"A": 1}, never()):
        assert try_one(gpus, {}) is None


def test_the_emptier_gpu_first_and_each_by_its_own_prediction() -> None:
    gpus = Gpus(TWO)
    needs = {"A": 60, "B": 30}
    with gpus.with_room(needs, never()) as first, gpus.with_room(needs, never()) as two:
        assert {*first.gpus, *two.gpus} == {*TWO}
        assert try_one(gpus, needs) is None
        third = try_one(gpus, {"A": 60, "B": 20})
        assert third is not None
        assert third.gpus == (TWO[1],)


def test_a_large_cell_is_not_overtaken_for_ever() -> None:
    """Small cells that come after it wait until it has had its turn."""
    gpus, order = Gpus(ONE), []
    small = {"A": 10}

    def run(name: str, needs: dict[str, int]) -> None:
        with gpus.with_room(needs, never()):
            order.append(name)

    with gpus.with_room(small, never()):
        large = threading.Thread(target=run, args=("large", {"A": 100}))
        large.start()
        while not gpus._turn.locked():
            time.sleep(0.01)
        later = [threading.Thread(target=run, args=("small", small)) for _ in range(3)]
        for thread in later:
            thread.start()
        time.sleep(0.3)
        assert order == []
    for thread in (large, *later):
        thread.join()
    assert order == ["large", "small", "small", "small"]


def test_whoever_waits_hears_that_the_run_is_stopped() -> None:
    gpus, stop, heard = Gpus(ONE), threading.Event(), []

    def wait() -> None:
        try:
            with gpus.with_room({}, stop):
                pass
        except Stopped:
            heard.append(True)

    with gpus.with_room({}, never()):
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        stop.set()
        for thread in threads:
            thread.join(10)
    assert heard == [True] * 3


def test_no_gpu_ever_holds_more_than_was_free() -> None:
    """Many threads, cells of all sizes, some of unknown size."""
    gpus, held, alone = Gpus(TWO), Counter[str](), Counter[str]()
    lock, wrong = threading.Lock(), []
    free = {gpu.uuid: gpu.free_bytes for gpu in TWO}

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(100):
            size = draw.randint(1, 50)
            needs = {"A": size, "B": size} if draw.random() < 0.9 else {}
            with gpus.with_room(needs, never()) as share:
                uuid = share.gpus[0].uuid
                with lock:
                    held[uuid] += size if needs else 0
                    alone[uuid] += 0 if needs else 1
                    if held[uuid] > free[uuid] or alone[uuid] > (not held[uuid]):
                        wrong.append((uuid, held[uuid], alone[uuid]))
                with lock:
                    held[uuid] -= size if needs else 0
                    alone[uuid] -= 0 if needs else 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not any(held.values())


# A whole run.


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one GPU that does not exist, and a sweep of eight cells."""
    gpu = PhysicalGpu(uuid="GPU-aaaa", model=H100, free_bytes=80 * 2**30)
    monkeypatch.setattr(environment, "gpus", lambda: [gpu])
    monkeypatch.setattr(environment, "num_cores", lambda: 4)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 2**40)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SWEEP)
    return tmp_path


def run(*words: str, worker: str = "fake_device") -> int:
    whole = ["run", "mine.toml", "-o", "runs.jsonl", *words]
    return cli.main(whole, worker_module=f"harness.workers.{worker}")


def predicting(sizes: dict[str, int]) -> Any:
    """A prediction by method; none for a method that is not named."""

    def predict(
        cells: Sequence[Cell], models: Sequence[str], *_: object, **__: object
    ) -> dict[Cell, dict[str, int]]:
        return {
            cell: {model: sizes[cell.method] for model in models}
            for cell in cells
            if cell.method in sizes
        }

    return predict


def found() -> Iterator[Record]:
    yield from runs.read(Path("runs.jsonl"))


def test_a_packed_run(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells with a prediction share; the others are alone; records say which."""
    sizes = {"head": 20 * 2**30, "lora": 30 * 2**30, "meft1": 20 * 2**30}
    monkeypatch.setattr(packing, "predict", predicting(sizes))
    assert run("--pack") == 0
    shared: dict[str, list[bool]] = {r.cell.method: [] for r in found()}
    for record in found():
        shared[record.cell.method].append(record.environment.is_gpu_shared)
        assert record.environment.num_slots == 4
    assert shared["full"] == [False, False]
    assert sum(map(sum, shared.values())) >= 4
    said = capsys.readouterr().err
    assert "packing: 2 of 8 cells (full/" in said
    assert "have no prediction, and run alone" in said


def test_interrupted_while_memory_is_predicted(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell runs, and the same command goes on."""

    def predict(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(packing, "predict", predict)
    assert run("--pack") == harness.EXIT_INTERRUPTED
    assert [*found()] == []
    monkeypatch.setattr(packing, "predict", predicting({"head": 1}))
    assert run("--pack", "--only", "head") == 0


def test_cells_of_one_slot_share_nothing(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "predict", predicting({"head": 1}))
    assert run("--pack", "--slots", "1", "--only", "head") == 0
    assert not any(record.environment.is_gpu_shared for record in found())


def test_slots_that_share_a_gpu_are_marked(there: Path) -> None:
    """Also where nobody has predicted that they fit."""
    assert run("--slots", "2", "--only", "head", worker="fake_device") == 0
    assert all(record.environment.is_gpu_shared for record in found())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pack", "--device", "cpu"], "none of these runs on one: give"),
        (["--pack", "--engine", "ray"], "with --engine ray each has a GPU of its own"),
    ],
)
def test_where_packing_has_no_effect_it_is_refused(
    there: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (there / "mine.toml").write_text(
        SWEEP.replace('defaults = { device = "cuda" }', "")
    )
    assert run(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "free_gib", "num_slots"),
    [
        ([], 1000, 1),
        (["--pack"], 1000, 4),
        (["--pack", "--threads", "2"], 1000, 2),
        (["--pack"], 9, 2),
        (["--pack"], 1, 1),
        (["--pack", "--memory-limit", "3GiB"], 9, 3),
        (["--pack", "--slots", "4"], 9, 4),
    ],
)
def test_slots_by_cores_and_memory(
    words: list[str],
    free_gib: int,
    num_slots: int,
    there: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Never more than free host memory has room for, unless the user says so."""
    monkeypatch.setattr(host_memory, "free_bytes", lambda: free_gib * 2**30)
    monkeypatch.setattr(packing, "predict", predicting({}))
    assert run(*words, "--only", "head", worker="fake_ok") == 0
    assert {r.environment.num_slots for r in found()} == {num_slots}
    is_less = "--pack" in words and "--slots" not in words and free_gib < 10
    assert ("of host memory are free" in capsys.readouterr().err) == is_less


# The prediction itself.

JOB = Job(
    sweep="a sweep",
    question="",
    caveats=(),
    options=ChildOptions(),
    timeout_seconds=300,
)


def test_which_cells_have_a_prediction() -> None:
    """Those whose scores take no more than a step, and that have one model."""
    cell = Cell(method="lora", device="cuda", seed=3)
    planned = {
        task: packing._planned(dataclasses.replace(cell, task=task), "H100", {})
        for task in (
            *("synthetic", "synthetic-lm", "sst2", "stsb", "mnist", "openbookqa"),
            *("squad", "gsm8k", "python:mine-0123"),
            *("data:classification-01", "data:options-01", "data:generation-01"),
        )
    }
    shapes = {task: one.task if one else None for task, one in planned.items()}
    assert shapes == {
        "synthetic": "synthetic",
        "synthetic-lm": "synthetic-lm",
        "sst2": "synthetic",
        "stsb": "synthetic",
        "mnist": "synthetic",
        "openbookqa": "synthetic-lm",
        "squad": None,
        "gsm8k": None,
        "python:mine-0123": None,
        "data:classification-01": "synthetic",
        "data:options-01": "synthetic-lm",
        "data:generation-01": None,
    }
    with_reference = dataclasses.replace(cell, reference="full")
    assert packing._planned(with_reference, "H100", {}) is None
    again = dataclasses.replace(cell, seed=4)
    one, other = (packing._planned(c, "H100", {}) for c in (cell, again))
    assert one == other


def test_a_gpu_that_nobody_has_described(tmp_path: Path) -> None:
    """No child starts, and there is no prediction."""
    cells = [Cell(method="lora", device="cuda")]
    found = packing.predict(cells, ["GPU A"], JOB, folder=tmp_path, stop=never())
    assert found == {}
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_real_prediction(tmp_path: Path) -> None:
    """As `meft-bench plan` says, and the margin; a cell that does not fit has none."""
    small = Cell(method="lora", backbone="random:bert-tiny", device="cuda")
    cells = [
        small,
        dataclasses.replace(small, seed=1),
        dataclasses.replace(small, method="full", batch_size=2**15),
    ]
    found = packing.predict(cells, [H100, H100], JOB, folder=tmp_path, stop=never())
    assert {*found} == {*cells[:2]}
    assert found[cells[0]] == found[cells[1]]
    assert 2**28 < found[small][H100] < 2**31
