"""Which GPU of a machine a cell has; the GPUs do not exist."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent import cli, runs
from meft_bench.parent.engines import environment
from meft_bench.parent.engines.environment import PhysicalGpu
from meft_bench.parent.engines.gpus import NONE, Gpus

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
        assert {first, second} == {*TWO}
        with gpus.some("cuda") as third:
            assert third == TWO[0]
            with gpus.some("cuda") as fourth:
                assert fourth == TWO[1]
    with gpus.some("cuda") as again:
        assert again == TWO[0]


def test_other_devices_have_none() -> None:
    with Gpus(TWO).some("cpu") as gpu, Gpus(TWO).some("virtual-H100") as other:
        assert (gpu, other) == (NONE, NONE)


def test_an_only_gpu_is_not_selected() -> None:
    """The variable of the environment stays as it is."""
    with Gpus(TWO[:1]).some("cuda") as gpu:
        assert gpu == PhysicalGpu(uuid="", model="GPU A")


def test_many_threads() -> None:
    """At no time does one GPU have two cells more than the other."""
    gpus, running, worst = Gpus(TWO), Counter[str](), [0]
    lock = threading.Lock()

    def work() -> None:
        for _ in range(200):
            with gpus.some("cuda") as gpu:
                with lock:
                    running[gpu.uuid] += 1
                    worst[0] = max(worst[0], running[gpu.uuid])
                with lock:
                    running[gpu.uuid] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= worst[0] <= len(threads)
    assert not any(running.values())


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
