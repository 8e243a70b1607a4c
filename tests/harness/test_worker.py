import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from marks import slow_but_for
from meft_bench.child.measuring.partial_result import remark
from meft_bench.child.meters.profiled import COMPILED
from meft_bench.child.training.out_of_memory import is_out_of_memory
from meft_bench.child.worker import one_line, run
from meft_bench.shared import methods, outcome, request
from meft_bench.shared.breakdown import ROW
from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS

TINY: dict[str, Any] = {
    "backbone": "random:bert-tiny",
    "batch_size": 2,
    "seq_len": 8,
    "max_steps": 3,
    "warmup_steps": 1,
}


def child(folder: Path, cell: Cell, **options: Any) -> dict[str, Any]:
    """The result of a real child process."""
    out = folder / "seen.json"
    body = {"cell": cell.to_json(), "options": {"num_threads": 1} | options}
    command = request.command(body, out, worker_module=request.WORKER)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert [path.name for path in folder.iterdir()] == ["seen.json"]
    return result


@pytest.mark.parametrize(
    "method",
    slow_but_for(METHODS, "full", "checkpointing", "meft1", "meft1-exact", "sparse"),
)
def test_every_method_is_measured(method: str) -> None:
    """Each ends ok, with every figure that a CPU can give and no score."""
    result = run(Cell(method=method, **TINY), ChildOptions())
    if result["status"] == "skipped":
        pytest.skip(str(result["message"]))  # a package or CUDA that is not here
    if method == "prefix-tuning":
        assert "take a language model" in str(result["message"])
        return
    assert (result["status"], result["message"]) == ("ok", "")
    assert isinstance(result["measurement"], dict)
    seen = Measurement(**result["measurement"])
    for name in (
        "num_parameters",
        "num_trainable_parameters",
        "saved_bytes",
        "model_state_bytes",
        "peak_host_bytes",
        "step_seconds",
        "step_seconds_iqr",
    ):
        # MeZO has no backward, for which a forward could save anything.
        assert getattr(seen, name) > 0 or (method, name) == ("mezo", "saved_bytes")
    assert seen.num_blocks == 2
    assert seen.num_steps == 3
    assert seen.loss_curve is not None
    assert seen.all_step_seconds is not None
    assert len(seen.loss_curve) == len(seen.all_step_seconds) == 3
    assert seen.peak_allocated_bytes is not None
    assert seen.model_state_bytes is not None
    assert seen.peak_allocated_bytes > seen.model_state_bytes
    for name in ("peak_reserved_bytes", "nvml_process_bytes", "pcie_rx_bytes", "score"):
        assert getattr(seen, name) is None, name
    its = methods.TABLE[method]
    assert (seen.reconstruction_error is not None) == its.rebuilds
    assert (seen.start_deviation is not None) == its.is_reversible
    assert seen.step_ratio is None
    assert result["environment"] == {
        "device_name": "cpu",
        "num_threads": 1,
        "weights_origin": "random weights (bert-tiny shape)",
        "weights_sha256": None,
        "data_origin": "random input",
    }


@pytest.mark.parametrize("device", ["cpu", "virtual-H200"])
def test_an_encoder_and_a_decoder_have_one_depth(device: str) -> None:
    """All blocks of both are counted, and held against their twins, encoder first."""
    if device != "cpu" and torch.cuda.is_available():
        pytest.skip("there is a real GPU, which is left alone")
    fields = TINY | {"backbone": "random:bart-tiny", "depth": 3, "device": device}
    result = run(Cell(method="meft1-exact", **fields), ChildOptions())
    assert (result["status"], result["message"]) == ("ok", "")
    assert isinstance(result["measurement"], dict)
    seen = Measurement(**result["measurement"])
    assert seen.num_blocks == 6
    if device == "cpu":
        assert seen.reconstruction_error == seen.gradient_error == [0.0] * 6


def test_a_plain_cell_imports_only_what_it_needs(tmp_path: Path) -> None:
    """And garbage is not looked for in what it imports, which takes longer than it."""
    program = (
        "import gc, sys\n"
        "from meft_bench.child import worker\n"
        "worker.main()\n"
        "from meft_bench.virtual.prediction import predict\n"
        "heavy = {'datasets', 'evaluate', 'numba', 'pandas', 'peft', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    body = {"cell": Cell(method="full", **TINY).to_json(), "options": {}}
    command = request.command(body, tmp_path / "seen.json", worker_module="")
    place = command.index("-m")
    command[place : place + 2] = ["-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True True"]


def test_a_loss_that_is_not_finite_is_said() -> None:
    """The cell is measured all the same; its message says from which step on."""
    fields = TINY | {"max_steps": 5, "learning_rate": 1e30}
    result = run(Cell(method="full", **fields), ChildOptions())
    assert result["status"] == "ok"
    assert isinstance(result["measurement"], dict)
    losses = result["measurement"]["loss_curve"]
    first = losses.index(None)
    assert first > 0
    assert losses[first:] == [None] * (5 - first)
    assert result["message"] == f"the loss was not finite from step {first + 1} of 5 on"


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (None, ""),
        ([], ""),
        ([0.5, 0.25], ""),
        ([None], "the loss was not finite from step 1 of 1 on"),
        ([0.5, None, None], "the loss was not finite from step 2 of 3 on"),
        (
            [0.5, None, 0.25, None],
            "the loss was not finite in 2 of 4 steps, the first of them step 2",
        ),
    ],
)
def test_steps_whose_loss_is_not_finite_are_counted_from_one(
    losses: list[float | None] | None, said: str
) -> None:
    """A loss that recovers, as under a loss scale, has another remark than one that
    does not."""
    assert remark(losses) == said


def test_steps_are_interleaved_with_those_of_a_reference() -> None:
    """Its step and the ratio are recorded; what is measured of the method itself is
    what it would be alone."""
    alone = run(Cell(method="meft1-exact", **TINY), ChildOptions())
    result = run(
        Cell(method="meft1-exact", reference="adapters-checkpointing", **TINY),
        ChildOptions(),
    )
    assert (result["status"], result["message"]) == ("ok", "")
    assert isinstance(result["measurement"], dict)
    assert isinstance(alone["measurement"], dict)
    seen = Measurement(**result["measurement"])
    assert seen.reference_step_seconds is not None
    assert seen.reference_step_seconds > 0
    assert seen.step_ratio is not None
    assert seen.step_ratio > 0
    assert seen.step_ratio_iqr is not None
    for name in ("num_parameters", "saved_bytes", "peak_allocated_bytes", "loss_curve"):
        assert getattr(seen, name) == alone["measurement"][name], name


def test_the_start_comes_closer_with_every_bit() -> None:
    """Bit by bit, down to what the adapters do, which start small but not silent."""
    deviations = []
    for k in (0, 1, 2, 3, 16):
        result = run(Cell(method="meft1-exact", lost_bits=k, **TINY), ChildOptions())
        assert isinstance(result["measurement"], dict)
        deviations.append(result["measurement"]["start_deviation"])
    assert deviations == sorted(deviations, reverse=True)
    assert len(set(deviations)) == len(deviations)
    assert deviations[-1] > 0


def test_a_kernel_of_attention_that_is_not_there_skips_the_cell() -> None:
    """That a device has no such kernel is not an error; the message says which."""
    cell = Cell(method="meft1-exact", attention="sdpa-efficient", **TINY)
    result = run(cell, ChildOptions())
    assert result["status"] == "skipped"
    assert "'sdpa-efficient': torch has no such kernel for cpu" in str(
        result["message"]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa-math"])
def test_attention_by_name(attention: str) -> None:
    """Every kernel that a CPU has for attention with dropout gives an exact inverse."""
    cell = Cell(method="meft1-exact", attention=attention, **TINY)
    result = run(cell, ChildOptions())
    assert (result["status"], result["message"]) == ("ok", "")
    assert result["measurement"]["gradient_error"] == [0.0, 0.0]  # type: ignore[index]


@pytest.mark.slow
# Both from inside torch's compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The .grad attribute")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_blocks_are_rebuilt_exactly(dtype: str) -> None:
    """Where a compiled module's bits depend on whether gradients are wanted, the
    library takes the safe path."""
    cell = Cell(method="meft1-exact", blocks="compiled", dtype=dtype, **TINY)
    result = run(cell, ChildOptions())
    assert (result["status"], result["message"]) == ("ok", "")
    assert result["measurement"]["gradient_error"] == [0.0, 0.0]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The .grad attribute")
@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
def test_the_peak_of_compiled_blocks_is_explained(method: str) -> None:
    """To the byte; of the model state, every byte has its module and kind."""
    cell = Cell(method=method, blocks="compiled", **TINY)
    result: Any = run(cell, ChildOptions())
    found, measured = result["memory_breakdown"], result["measurement"]
    assert found["peak_bytes"] == measured["peak_allocated_bytes"]
    rows = [dict(zip(ROW, row, strict=True)) for row in found["rows"]]
    stay = [row for row in rows if row["kind"] in ("parameters", "frozen", "optimizer")]
    assert sum(row["num_bytes"] for row in stay) == pytest.approx(
        measured["model_state_bytes"], rel=0.02
    )
    compiled = [row for row in rows if row["module"] == COMPILED]
    assert {row["kind"] for row in compiled} & {"saved", "forward", "backward"}
    assert {row["operator"] for row in compiled} <= {
        *("CompiledFunction", "CompiledFunctionBackward"),
        *(row["operator"] for row in compiled if row["operator"].startswith("aten::")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "meft1"])
def test_memory_is_the_same_in_every_process(tmp_path: Path, method: str) -> None:
    """Saved bytes, model-state bytes and the allocator's peak agree to the byte."""
    seen = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        result = child(tmp_path / name, Cell(method=method, **TINY))
        assert result["status"] == "ok", result["message"]
        seen.append(result["measurement"])
    for name in (
        "saved_bytes",
        "model_state_bytes",
        "peak_allocated_bytes",
        "loss_curve",
    ):
        assert seen[0][name] is not None
        assert seen[0][name] == seen[1][name], name


@pytest.mark.slow
def test_running_out_of_memory_is_a_result(tmp_path: Path) -> None:
    """A limit that torch and the model fit into, but no training step does.

    What was seen before the allocation that failed is kept.
    """
    big = Cell(method="full", **TINY | {"batch_size": 512, "seq_len": 512})
    result = child(tmp_path, big, memory_limit_bytes=2 << 30)
    assert result["status"] == "oom"
    assert "allocate memory" in result["message"]
    assert result["measurement"]["num_parameters"] == 4_386_178
    assert result["measurement"]["num_steps"] == 0
    assert result["measurement"]["saved_bytes"] is None


def test_missing_data_skips_the_cell_and_names_three_ways() -> None:
    """It is not an error of the cell's, and nothing is downloaded."""
    cell = Cell(method="full", task="rte", **TINY)
    result = run(cell, ChildOptions())
    assert result["status"] == "skipped"
    for way in ("--data DIR", "--allow-download", "bbc-news"):
        assert way in str(result["message"])


def test_an_error_is_reported_in_one_line() -> None:
    """Type and message; the traceback goes to the log."""
    result = run(Cell(method="full", **TINY | {"seq_len": 513}), ChildOptions())
    assert result["status"] == "error"
    assert str(result["message"]).startswith("ValueError: `seq_len` is 513")
    assert one_line(KeyError()) == "KeyError"
    assert one_line(RuntimeError("first\nsecond")) == "RuntimeError: first"


def test_a_task_of_text_needs_a_tokenizer() -> None:
    """Random weights have no vocabulary, and the error says what to take."""
    cell = Cell(method="full", task="bbc-news", **TINY)
    result = run(cell, ChildOptions())
    if result["status"] == "skipped":
        pytest.skip(str(result["message"]))
    assert result["status"] == "error"
    assert "needs a tokenizer" in str(result["message"])


def test_selecting_weights_needs_rows_to_select_with() -> None:
    """Synthetic rows have no score."""
    result = run(Cell(method="full", eval_every=1, **TINY), ChildOptions())
    assert "`eval_every` is 1" in str(result["message"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..."), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory of mine"), False),
        (OSError(2, "No such file"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(
    error: Exception, expected: bool
) -> None:
    """By type and number, or by what torch and its libraries say."""
    assert is_out_of_memory(error) == expected


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """What JSON cannot hold leaves no file behind."""
    path = tmp_path / "seen.json"
    with pytest.raises(ValueError, match="JSON"):
        outcome.write(path, {"measurement": float("nan")})
    assert not list(tmp_path.iterdir())
    outcome.write(path, {"status": "ok"})
    assert [p.name for p in tmp_path.iterdir()] == ["seen.json"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", "meft1"])
def test_real_weights_learn_real_text(tmp_path: Path, method: str) -> None:
    """MiniLM on BBC News beats the majority class after a few steps."""
    cell = Cell(
        method=method,
        task="bbc-news",
        batch_size=16,
        seq_len=64,
        max_steps=30,
        learning_rate=2e-2 if method == "head" else 3e-3,
        eval_every=15,
        train_rows=400,
        eval_rows=100,
    )
    result = child(tmp_path, cell)
    if result["status"] == "skipped":
        pytest.skip(result["message"])
    assert result["status"] == "ok", result["message"]
    seen = Measurement(**result["measurement"])
    assert (seen.num_train_rows, seen.num_eval_rows) == (360, 100)
    assert seen.score_name == "accuracy"
    assert seen.score is not None
    assert seen.majority_score is not None
    assert seen.score > seen.majority_score + 0.2
    assert "of 1704 distinct articles" in result["environment"]["data_origin"]
    assert result["environment"]["weights_sha256"].startswith("53aa5117")
