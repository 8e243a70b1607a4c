"""Several ranks train as one process does; however they end, no rank is left."""

import json
import os
import subprocess
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.several import Case, command, train
from meft.testing import tolerance
from meft_bench.parent import cli, fields, runs
from meft_bench.parent.engines import child_process, isolate
from meft_bench.parent.engines.child_process import Stopped
from meft_bench.shared import methods
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Record, Status

NOT_HERE = ("streamed-offload", "lora-streamed-offload")
"""Methods that need CUDA."""
FAST = [
    Case(method="lora", micro_batch=4),
    Case(method="lora", labels="few", micro_batch=4),
    Case(method="full", labels="classes"),
    Case(method="meft1-exact"),
    Case(method="meft3-exact", micro_batch=4),
    Case(method="sparse-experts", micro_batch=4),
    Case(method="dense-offload"),
    Case(method="sparse-experts-divided", micro_batch=4),
    Case(method="sparse-experts-divided", parallel="fsdp2"),
    Case(method="full", parallel="fsdp2", micro_batch=4),
    Case(method="meft1-exact", parallel="fsdp2"),
]
SLOW = [
    *(
        Case(
            method=name, parallel=way, labels="classes" if name == "head" else "tokens"
        )
        for name, method in methods.TABLE.items()
        for way in method.parallel
        if name not in NOT_HERE and "bitfit" not in name
    ),
    *(
        Case(method=name, parallel=way, optimizer=optimizer)
        for name in ("lora", "full")
        for way in ("ddp", "fsdp2")
        for optimizer in ("adamw-fused", "sgd")
    ),
    Case(method="lora", parallel="fsdp2", dtype="bf16"),
    Case(method="lora", dtype="bf16"),
]
DEPTH = 3


def _of_ranks(
    cases: list[Case], size: int, folder: Path
) -> list[dict[Case, dict[str, Any]]]:
    """What each of some ranks has found of the cases."""
    started = [
        subprocess.Popen(command(rank, size, folder, cases)) for rank in range(size)
    ]
    try:
        assert [one.wait(1500) for one in started] == [0] * size
    finally:
        for one in started:
            one.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return [{case: its[repr(case)] for case in cases} for its in found]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
        )
        return _of_ranks(FAST, 2, tmp_path_factory.mktemp("ranks"))


def _assert_as_one(case: Case, found: list[dict[str, Any]]) -> None:
    """All ranks have the same bits, and one process the same but for the last ones."""
    first = found[0]
    for other in found[1:]:
        assert other["losses"] == first["losses"]
        for name, weight in first["weights"].items():
            assert torch.equal(other["weights"][name], weight), name
            assert torch.equal(other["gradients"][name], first["gradients"][name])
    alone = train(case)
    bound = tolerance(getattr(torch, _DTYPES[case.dtype]), DEPTH)
    assert first["losses"] == pytest.approx(alone["losses"], rel=bound)
    if methods.TABLE[case.method].streams == "float":
        return  # which rounds activations, and more in a backward that rebuilds
    assert first["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        error = (first["gradients"][name] - gradient).norm()
        assert error <= bound * gradient.norm(), name


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.mark.parametrize("case", FAST, ids=repr)
def test_two_ranks_train_as_one_process(case: Case, of_two: list[Any]) -> None:
    """Also where a rank has more target tokens than another, or none at all."""
    _assert_as_one(case, [its[case] for its in of_two])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_method_that_ranks_can_train(tmp_path: Path) -> None:
    found = _of_ranks(SLOW, 2, tmp_path)
    for case in SLOW:
        _assert_as_one(case, [its[case] for its in found])


@pytest.fixture
def run(tmp_path: Path, here: Environment) -> Callable[..., Record]:
    """Run a cell of two ranks with a fake worker."""

    def run_cell(worker: str, **changes: Any) -> Record:
        arguments: dict[str, Any] = {
            "sweep": "a sweep",
            "environment": here,
            "options": ChildOptions(),
            "timeout_seconds": 300.0,
            "folder": tmp_path,
            "stop": threading.Event(),
            "worker_module": f"harness.workers.{worker}",
        }
        return isolate.run(Cell(method="lora", ranks=2), **{**arguments, **changes})

    return run_cell


def test_a_killed_rank_ends_the_cell(
    run: Callable[..., Record], tmp_path: Path
) -> None:
    """The other one, which waits for it, is ended."""
    record = run("fake_rank_killed")
    assert record.status == Status.KILLED
    assert record.message.startswith("rank 1 of 2: SIGKILL")
    assert record.log_tail is not None
    assert record.log_tail.splitlines()[-1] == "rank 1 of 2 was ended by signal 9"
    assert [path.suffix for path in tmp_path.iterdir()] == [".log"]


def test_the_rank_that_failed_first_says_why(run: Callable[..., Record]) -> None:
    """And not the one that failed because of it."""
    record = run("fake_rank_fails")
    assert record.status == Status.ERROR
    assert record.message == "rank 1 of 2: division by zero"


@pytest.mark.slow
def test_ranks_without_an_outcome(run: Callable[..., Record]) -> None:
    """The message is the last line that one of them printed."""
    record = run("fake_ranks_exit")
    assert record.status == Status.ERROR
    assert record.message == "RuntimeError: the tokenizer is missing"


def test_ranks_out_of_time_are_killed(
    run: Callable[..., Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    """All of them, and the process that started them. The time is over as soon as both
    run, which takes longer on a busy machine."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    run_both = [pids / "0", pids / "1"]

    def monotonic() -> float:
        late = 1000 * all(path.exists() for path in run_both)
        return time.monotonic() + late

    clock = types.SimpleNamespace(monotonic=monotonic)
    monkeypatch.setattr(child_process, "time", clock)
    record = run("fake_ranks_hang")
    assert record.status == Status.TIMEOUT
    found = {int(pid) for path in run_both for pid in path.read_text().split()}
    assert len(found) == 3
    wait_until(lambda: not any(map(is_running, found)))


@pytest.mark.slow
def test_ranks_of_a_stopped_run_are_killed(
    run: Callable[..., Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_running: Callable[[int], bool],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    stop = threading.Event()
    run_both = [pids / "0", pids / "1"]

    def stop_when_both_run() -> None:
        wait_until(lambda: all(path.exists() for path in run_both))
        stop.set()

    waiting = threading.Thread(target=stop_when_both_run)
    waiting.start()
    with pytest.raises(Stopped):
        run("fake_ranks_hang", stop=stop)
    waiting.join()
    found = {int(pid) for path in run_both for pid in path.read_text().split()}
    wait_until(lambda: not any(map(is_running, found)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"parallel": "fsdp2", "ranks": 1}, "shards nothing: set `ranks` to 2 or more"),
    ({"batch_size": 6, "ranks": 4}, "take a multiple, such as 8"),
    ({"device": "virtual-H100"}, "predict a script with `--ranks`"),
    ({"method": "lisa"}, "leave `ranks` out, or take a method such as full"),
    ({"method": "sparse-experts-union"}, "leave `ranks` out, or take a method"),
    ({"method": "sparse", "parallel": "fsdp2"}, "take `parallel` = 'ddp', or a method"),
    ({"method": "meft3", "parallel": "fsdp2"}, "take `parallel` = 'ddp', or a method"),
    ({"optimizer": "lomo"}, "take 'adamw', 'adamw-fused', 'sgd'"),
    ({"optimizer": "adamw-8bit"}, "take 'adamw', 'adamw-fused', 'sgd'"),
    ({"reference": "full"}, "leave it out, or `ranks` = 1"),
    ({"blocks": "compiled"}, "take 'eager', or `ranks` = 1"),
    ({"weights_dtype": "nf4", "dtype": "bf16"}, "take 'bf16', or `ranks` = 1"),
    ({"mlp_chunks": 2, "parallel": "fsdp2"}, "take 1, or `parallel` = 'ddp'"),
    ({"dtype": "fp16", "parallel": "fsdp2"}, "take 'bf16', or `parallel` = 'ddp'"),
    (
        {"loss_chunk_tokens": 8, "task": "synthetic-lm", "parallel": "fsdp2"},
        "take 0, or `parallel` = 'ddp'",
    ),
]


@pytest.mark.parametrize(("changes", "remedy"), REFUSED)
def test_what_ranks_cannot_train(changes: dict[str, Any], remedy: str) -> None:
    """It is refused with the remedy before a child starts."""
    cell = Cell(**{"method": "lora", "ranks": 2, **changes})
    with pytest.raises(ValueError, match=remedy):
        fields.check_together(cell)


def test_the_id_of_a_cell_of_one_rank() -> None:
    """It is that of a cell that says nothing of ranks."""
    assert Cell(method="lora", ranks=1).id == Cell(method="lora").id
    both = Cell(method="lora", ranks=2, parallel="fsdp2").id
    assert both.endswith("/ranks=2/parallel=fsdp2")


SWEEP = """
question = "Do ranks train as one process?"
[[matrix]]
name = "one"
defaults = { backbone = "random:llama-tiny", task = "synthetic-lm", batch_size = 4, \
seq_len = 8, depth = 1, max_steps = 3, warmup_steps = 1, num_neurons = 64 }
axes = { method = ["lora", "sparse-experts", "sparse-experts-divided", \
"meft1-exact"], ranks = [1, 2] }
[[matrix.exclude]]
method = "meft1-exact"
ranks = 2
[[matrix]]
name = "shards"
defaults = { backbone = "random:llama-tiny", task = "synthetic-lm", batch_size = 4, \
seq_len = 8, depth = 1, max_steps = 3, warmup_steps = 1, ranks = 2, parallel = "fsdp2" }
axes = { method = ["full", "meft1-exact"] }
"""


@pytest.mark.slow
def test_cells_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records have the largest peak of a rank, and the sum."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SWEEP)
    words = ["run", "mine.toml", "--device", "cpu", "-o", "runs.jsonl"]
    assert cli.main(words) == 0
    found = {(r.cell.method, r.cell.ranks): r for r in runs.read(Path("runs.jsonl"))}
    assert len(found) == 9
    for (_, ranks), record in found.items():
        seen = record.measurement
        for name in ("peak_allocated_bytes", "saved_bytes"):
            most, total = getattr(seen, name), getattr(seen, f"sum_{name}")
            if name == "saved_bytes" and record.cell.parallel == "fsdp2":
                assert most is None
                continue
            assert total is None if ranks == 1 else most < total <= 2 * most
    bound = tolerance(torch.float32, DEPTH)
    for method in ("lora", "sparse-experts", "sparse-experts-divided"):
        one, two = (found[method, ranks].measurement for ranks in (1, 2))
        assert two.loss_curve == pytest.approx(one.loss_curve, rel=bound)
        assert two.saved_bytes < one.saved_bytes
    bytes_of = [
        found["sparse-experts-divided", ranks].measurement.row_store_bytes
        for ranks in (1, 2)
    ]
    assert bytes_of[1] == bytes_of[0] // 2
    state = "model_state_bytes"
    whole, shards = (found["meft1-exact", ranks].measurement for ranks in (1, 2))
    assert getattr(shards, state) < 0.6 * getattr(whole, state)
    document = json.loads(json.dumps(found["full", 2].to_json()))
    assert Record.from_json(document) == found["full", 2]
