"""Which GPU of a machine a cell has; the GPUs do not exist."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent import arguments, cli, runs, selection
from meft_bench.parent.engines import environment, host_memory
from meft_bench.parent.engines.environment import PhysicalGpu
from meft_bench.parent.engines.gpus import Gpus

TWO = [
    PhysicalGpu(uuid="GPU-aaaa", model="GPU A"),
    PhysicalGpu(uuid="GPU-bbbb", model="GPU B"),
]
SWEEP = """
question = "Which GPU?"
[[matrix]]
name = "one"
defaults = { device = "cuda" }
axes = { method = ["full", "head", "lora", "meft1"], seed = [0, 1] }
"""


def test_the_gpu_with_the_fewest_cells() -> None:
    gpus = Gpus(TWO)
    with gpus.some("cuda") as first, gpus.some("cuda") as second:
        assert {*first.gpus, *second.gpus} == {*TWO}
        assert not first.is_shared
        with gpus.some("cuda") as third:
            assert third.gpus == (TWO[0],)
            with gpus.some("cuda") as fourth:
                assert fourth.gpus == (TWO[1],)
        assert all(one.is_shared for one in (first, second, third, fourth))
    with gpus.some("cuda") as again:
        assert again.gpus == (TWO[0],)
        assert not again.is_shared


def test_other_devices_have_none() -> None:
    with Gpus(TWO).some("cpu") as one, Gpus(TWO).some("virtual-H100") as other:
        assert (one.gpus, other.gpus) == ((), ())


def test_an_only_gpu_is_not_selected() -> None:
    """The variable of the environment stays as it is."""
    for gpus, uuid in ((TWO[:1], ""), (TWO, "GPU-aaaa")):
        its = Gpus(gpus)
        with its.some("cuda") as share:
            assert its.uuids_of(share) == uuid
            assert share.model == TWO[0].model


def test_a_cell_of_several_ranks_has_as_many_gpus() -> None:
    """Of one model if there are enough, those with the fewest cells; else all."""
    four = [PhysicalGpu(uuid=f"GPU-{n}", model="AABB"[n]) for n in range(4)]
    gpus = Gpus(four)
    with gpus.some("cuda") as first:
        assert first.gpus == (four[0],)
        with gpus.some("cuda", 2) as pair:
            assert gpus.uuids_of(pair) == "GPU-2,GPU-3"
            assert pair.model == "B"
            with gpus.some("cuda", 2) as other:
                assert gpus.uuids_of(other) == "GPU-1,GPU-0"
            assert first.is_shared
            assert not pair.is_shared
    with gpus.some("cuda", 3) as three:
        assert gpus.uuids_of(three) == "GPU-0,GPU-1,GPU-2"
    with gpus.some("cuda", 8) as every:
        assert gpus.uuids_of(every) == "GPU-0,GPU-1,GPU-2,GPU-3"


def test_many_threads() -> None:
    """At no time does one GPU have two cells more than the other."""
    gpus, running, worst = Gpus(TWO), Counter[str](), [0]
    lock = threading.Lock()

    def work() -> None:
        for _ in range(200):
            with gpus.some("cuda") as share:
                with lock:
                    running[share.gpus[0].uuid] += 1
                    worst[0] = max(worst[0], running[share.gpus[0].uuid])
                with lock:
                    running[share.gpus[0].uuid] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= worst[0] <= len(threads)
    assert not any(running.values())


def test_a_run_of_several_ranks_has_fewer_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the cells that run side by side share no GPU, and no core."""
    four = [PhysicalGpu(uuid=f"GPU-{n}", model="A") for n in range(4)]
    monkeypatch.setattr(environment, "gpus", lambda: four)
    monkeypatch.setattr(environment, "num_cores", lambda: 8)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: None)
    path = tmp_path / "mine.toml"
    for ranks, slots, threads in (("[1]", 4, 2), ("[1, 2]", 2, 2), ("[8]", 1, 1)):
        path.write_text(SWEEP.replace("seed = [0, 1]", f"ranks = {ranks}"))
        words = ["run", str(path), "-o", str(tmp_path / "runs.jsonl")]
        plan = selection.run_plan(arguments.parser().parse_args(words))
        assert (plan.num_slots, plan.options.num_threads) == (slots, threads)


@pytest.mark.parametrize(("words", "num_slots"), [([], 2), (["--slots", "4"], 4)])
def test_a_run_uses_all_gpus(
    words: list[str], num_slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many cells side by side as there are GPUs; records have the model."""
    monkeypatch.setattr(environment, "gpus", lambda: TWO)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SWEEP)
    whole: list[Any] = ["run", "mine.toml", "-o", "runs.jsonl", *words]
    assert cli.main(whole, worker_module="harness.workers.fake_device") == 0
    found = runs.read(Path("runs.jsonl"))
    assert {record.environment.num_slots for record in found} == {num_slots}
    models = {"GPU-aaaa": "GPU A", "GPU-bbbb": "GPU B"}
    seen = Counter(record.environment.machine for record in found)
    assert {*seen} == {"GPU A", "GPU B"}
    for record in found:
        uuid = record.message.split('"')[3]
        assert models[uuid] == record.environment.machine
    before = len(found)
    assert cli.main(whole, worker_module="harness.workers.fake_device") == 0
    assert len(runs.read(Path("runs.jsonl"))) == before
