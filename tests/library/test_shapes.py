"""Calls have the types and the shapes of tensors that their annotations say.

The check of every call doubles the time of a test, so it is done by `tox -e full` only:
in all slow tests, and here in some fast ones that go through all families and both
methods.
"""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CHECKED = (
    "test_families.py::test_gradients_are_the_twins",
    "test_bottleneck.py",
    "test_linear_cross_entropy.py::test_chunks_change_nothing_but_rounding",
    "test_sparse_adapter.py",
    "test_sparse_families.py::test_offloaded_is_resident",
)
WRONG = """
import pytest
import torch
from jaxtyping import TypeCheckError
from meft.bottleneck import Bottleneck

def test_integers_in_place_of_hidden_states():
    with pytest.raises(TypeCheckError, match="hidden"):
        Bottleneck(8, 2, torch.relu, 0.0)(torch.zeros(3, 8, dtype=torch.long))
"""


@pytest.mark.slow
def test_every_call_has_the_shapes_that_are_written(tmp_path: Path) -> None:
    """Of blocks and adapters of every family, of a loss in chunks and of rows; a wrong
    call is noticed."""
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(WRONG)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--jaxtyping-packages=meft,beartype.beartype", str(wrong)]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in CHECKED)],
        cwd=TESTS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
