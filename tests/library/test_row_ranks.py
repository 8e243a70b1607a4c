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
from library.sparse import plain_model
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


@pytest.mark.parametrize("kind", KINDS)
def test_processes_end_with_the_same_rows(kind: str, of_two: list[Any]) -> None:
    """In every bit, also where rows of one had other values before."""
    first, second = (its[kind] for its in of_two)
    for part in ("gradients", "weights"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), (part, name)


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
