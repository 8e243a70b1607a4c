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
    Case(method="full", parallel="fsdp2", micro_batch=4),
    Case(method="meft1-exact", parallel="fsdp2"),
]
SLOW = [
    *(
        Case(method=name, parallel=way, labels="classes" if name == "head" else "tokens")
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


def _of_ranks(cases: list[Case], size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of some ranks has found of the cases."""
    started = [
        subprocess.Popen(command(rank, size, folder, cases)) for rank in range(size)
    ]
    try:
        assert [one.wait(500) for one in started] == [0] * size
    finally:
        for one in started:
            one.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return [{case: its[repr(case)] for case in cases} for its in found]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ["PYTHONPATH"]]))
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
@pytest.mark.parametrize("size", [2, 4])
def test_every_method_that_ranks_can_train(size: int, tmp_path: Path) -> None:
    found = _of_ranks(SLOW, size, tmp_path)
    for case in SLOW:
        _assert_as_one(case, [its[case] for its in found])
