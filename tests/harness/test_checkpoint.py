"""A training that was killed goes on from its last checkpoint, in every bit."""

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from harness.tiny import cell, classifier
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.tasks.batches import Example, epochs
from meft_bench.child.training import checkpoint as module
from meft_bench.child.training.checkpoint import Checkpoint
from meft_bench.child.training.steps import Stepper, seed_everything, train
from meft_bench.child.worker import run
from meft_bench.parent.engines import isolate
from meft_bench.shared import methods
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Environment, Status
from meft_bench.shared.registry import METHODS, load

STEPS = 8


class Run:
    """A training of a tiny model, which may be left after any step."""

    def __init__(self, path: Path | None, identity: str = "i", **fields: Any) -> None:
        self.cell = cell(max_steps=STEPS, batch_size=2, **fields)
        seed_everything(0)
        model = classifier("bert", hidden_dropout_prob=0.2)
        method = load(METHODS[self.cell.method])
        self.stepper = Stepper(method(model, self.cell), self.cell)
        self.clock = StepClock(0, "cpu")
        generator = torch.Generator().manual_seed(0)
        rows = [
            Example(
                token_ids=torch.randint(3, 30, (6,), generator=generator).tolist(),
                segment_ids=[0] * 6,
                label=index % 2,
            )
            for index in range(7)
        ]
        scores = itertools.count()
        self.steps: Iterator[float] = train(
            self.stepper,
            self.cell,
            epochs(rows, self.cell),
            self.clock,
            lambda: -abs(next(scores) - 1.0),
            Checkpoint(path, identity),
        )

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.stepper.trained]


WAYS: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    {"method": "full", "optimizer": "sgd"},
    {"method": "lora", "dtype": "bf16"},
    {"method": "adapters", "accumulation": 2},
    {"method": "meft1-exact"},
    {"method": "checkpointing"},
    {"method": "full", "optimizer": "adamw-in-backward"},
    {"method": "full", "eval_every": 2},
)


@pytest.mark.parametrize("fields", WAYS, ids=str)
@pytest.mark.parametrize("num_done", [1, 5])
def test_steps_after_a_checkpoint_are_those_of_a_whole_training(
    tmp_path: Path, fields: dict[str, Any], num_done: int
) -> None:
    """Losses and weights, with dropout, in every bit."""
    whole = Run(None, **fields)
    losses = list(whole.steps)
    path = tmp_path / "a.checkpoint"
    killed = Run(path, **fields)
    # The state is written when the next loss is asked for.
    for _ in range(num_done + 1):
        next(killed.steps)
    again = Run(path, **fields)
    torch.manual_seed(7)  # whatever a new process has
    assert list(again.steps) == losses
    assert len(again.clock.all_step_seconds) == STEPS
    if "eval_every" not in fields:  # its scores are counted by call
        for one, other in zip(whole.weights(), again.weights(), strict=True):
            assert torch.equal(one, other)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    """With the number of validations since, so that a training stops when it would."""
    path = tmp_path / "a.checkpoint"
    fields: dict[str, Any] = {"method": "full", "eval_every": 1, "patience": 3}
    whole = Run(None, **fields)
    losses = list(whole.steps)
    assert len(losses) == 5  # the second of all scores is the best
    killed = Run(path, **fields)
    for _ in range(4):
        next(killed.steps)
    again = Run(path, **fields)
    # All scores of a new process are worse than the best one so far.
    found = list(again.steps)
    assert found[:4] == losses[:4]
    for one, other in zip(whole.weights(), again.weights(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "content", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "]
)
def test_a_damaged_checkpoint_is_ignored(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.checkpoint"
    path.write_bytes(content)
    found = list(Run(path, method="lora").steps)
    assert found == list(Run(None, method="lora").steps)
    assert "start again" in capsys.readouterr().err


def test_a_checkpoint_is_of_one_cell_and_code(tmp_path: Path) -> None:
    """Another identity starts again."""
    path = tmp_path / "a.checkpoint"
    killed = Run(path, method="lora")
    for _ in range(4):
        next(killed.steps)
    other = Run(path, "another", method="lora")
    next(other.steps)
    assert other.clock.all_step_seconds != killed.clock.all_step_seconds[:1]
    assert len(other.clock.all_step_seconds) == 1


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """The file is tensors and JSON."""
    path = tmp_path / "a.checkpoint"
    killed = Run(path, method="full")
    for _ in range(3):
        next(killed.steps)
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    assert len(state["progress"]["losses"]) == 2
    assert [*tmp_path.iterdir()] == [path]


def test_large_states_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    path = tmp_path / "a.checkpoint"
    list(Run(path, method="full").steps)
    assert not path.exists()


def test_every_method_has_a_state_that_is_whole_or_none() -> None:
    """Methods whose update is their own have an optimizer that is none of torch's."""
    for method in methods.TABLE.values():
        if method.optimizer:
            kind = load(f"{methods.FUNCTIONS}.{method.optimizer}")
            assert kind not in module.KINDS


def test_a_killed_cell_goes_on(
    tmp_path: Path, here: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child of the next run is given the file of the last one."""
    seen: list[ChildOptions] = []
    fields: dict[str, Any] = {"method": "lora", "backbone": "random:bert-tiny"}
    one = Cell(**fields, batch_size=2, seq_len=8, max_steps=4, warmup_steps=1)

    def start(command: list[str], **_: Any) -> int:
        body = json.loads(command[command.index("--request") + 1])
        seen.append(ChildOptions(**body["options"]))
        return -9

    for _ in range(2):
        record = isolate.run(
            one,
            sweep="s",
            environment=here,
            options=ChildOptions(),
            timeout_seconds=1.0,
            folder=tmp_path,
            stop=threading.Event(),
            start_child=start,
        )
        assert record.status == Status.KILLED
    assert seen[0] == seen[1]
    assert seen[0].checkpoint is not None
    options = dataclasses.replace(seen[0], checkpoint_seconds=0.0)
    result: Any = run(one, options)
    assert result["status"] == "ok"
    assert not Path(seen[0].checkpoint).exists()  # the cell has ended by itself
