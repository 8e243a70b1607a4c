"""Sparse adapters whose rows are divided among processes."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from library.row_shares import QUICK


@functools.cache
def found_by(size: int, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each of some processes has found."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(size), folder, *kinds]
        run_in_each("library.row_shares", size, arguments)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(size)]


def run_in_each(module: str, size: int, arguments: list[str]) -> None:
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), *arguments],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(size)
    ]
    try:
        assert [one.wait(500) for one in started] == [0] * size
    finally:
        for one in started:
            one.kill()


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal in every bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check(found: list[dict[str, Any]], kind: str) -> None:
    for rank, its in enumerate(found):
        whole, share = its[kind][False], its[kind][True]
        for part in ("losses", "norms"):
            assert same(whole[part], share[part]), (
                rank,
                part,
                whole[part],
                share[part],
            )
    whole, share = found[0][kind][False], found[0][kind][True]
    assert whole["weights"].keys() == share["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, share["weights"][name]), name
    assert same(whole["optimizer"], share["optimizer"])


@pytest.mark.parametrize("kind", QUICK)
def test_two_processes_with_a_share_have_the_bits_of_two_with_all(kind: str) -> None:
    """Losses, norms of clipping, rows and moments, from batches of unequal size."""
    check(found_by(2, QUICK), kind)
