"""Sparse adapters that several processes train, each with all rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import meft
from library.row_ranks import KINDS, WORLD_SIZE, train
from library.sparse import plain_model, sparse_model
from meft.testing import tolerance


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "library.row_ranks", str(rank), str(folder)],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        assert [one.wait(500) for one in started] == [0] * WORLD_SIZE
    finally:
        for one in started:
            one.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_end_with_the_same_rows(kind: str, of_two: list[Any]) -> None:
    """In every bit, also where rows of one had other values before."""
    first, second = (its[kind] for its in of_two)
    for part in ("gradients", "weights"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), (part, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_one_process(kind: str, of_two: list[Any]) -> None:
    """In every bit: it adds the gradients of both batches in the same order. Where each
    process accumulates, the order is another."""
    found, alone = of_two[0][kind], train(kind, None)
    for name, gradient in alone["gradients"].items():
        assert gradient.any()
        if kind == "accumulated":
            error = (found["gradients"][name] - gradient).norm()
            assert error <= tolerance(torch.float32, 2) * gradient.norm(), name
        else:
            assert torch.equal(found["gradients"][name], gradient), name
            assert torch.equal(found["weights"][name], alone["weights"][name]), name


def test_a_model_without_sparse_adapters() -> None:
    with pytest.raises(meft.UnsupportedModelError, match="add_sparse_adapters"):
        meft.average_row_gradients(plain_model(depth=1))


_SCRIPT = """
import os, sys, gloo_group, meft, torch
from transformers import Trainer, TrainingArguments
from library.sparse import batches, sparse_model

folder, rank = sys.argv[1], os.environ["RANK"]
rows = [
    {name: tensor[i] for name, tensor in batch.items()}
    for batch in batches(4) for i in range(2)
]
arguments = TrainingArguments(
    f"{folder}/{rank}", max_steps=2, per_device_train_batch_size=1,
    gradient_accumulation_steps=2, learning_rate=1e-2, use_cpu=True,
    report_to="none", save_strategy="no", disable_tqdm=True,
    dataloader_pin_memory=False, ddp_find_unused_parameters=False,
)
arguments.device  # joins the other process
model = sparse_model(depth=2)
meft.average_row_gradients(model)
chosen = meft.optimizer_cls_and_kwargs(arguments)
Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen).train()
assert torch.distributed.get_world_size() == 2
state = {name: p.detach().clone() for name, p in model.named_parameters()}
torch.save(state, f"{folder}/{rank}.pt")
gloo_group.leave()
"""


@pytest.mark.slow
def test_torchrun_with_the_trainer(tmp_path: Path) -> None:
    """Two processes, each with batches of its own, end with the same rows."""
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=500)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    before = dict(sparse_model(depth=2).named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [name for name in first if name.endswith("neurons")]
    assert rows
    assert not any(torch.equal(first[name], before[name].detach()) for name in rows)
