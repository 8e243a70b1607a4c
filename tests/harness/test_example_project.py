"""The example of docs/ci.md: a project of its own, whose tests check its memory."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "memory-in-ci"
BASELINE = "tests/__meft__/test_memory.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.is_dir(), reason="no examples next to the tests"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy, which may be changed; under the torch that its baselines are of."""
    version = importlib.metadata.version("torch").partition("+")[0]
    entries = json.loads((EXAMPLE / BASELINE).read_text()).values()
    if not all(key.startswith(f"torch {version},") for e in entries for key in e):
        pytest.skip(f"the baselines of the example are not of torch {version}")
    return Path(shutil.copytree(EXAMPLE, tmp_path / "project"))


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run its tests as its CI does."""
    found = importlib.metadata.entry_points(group="pytest11", name="meft")
    named = [] if found else ["-p", "meft_bench.pytest_plugin"]
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *named, *words],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_tests_pass(project: Path) -> None:
    before = (project / BASELINE).read_bytes()
    found = run(project)
    assert found.returncode == 0, found.stdout
    assert "3 passed" in found.stdout
    assert (project / BASELINE).read_bytes() == before


def test_a_wider_model_fails_where_it_is_wider(project: Path) -> None:
    path = project / "training.py"
    text = path.read_text()
    assert "4 * width" in text
    path.write_text(text.replace("4 * width", "8 * width"))
    found = run(project)
    assert "3 failed" in found.stdout, found.stdout
    assert "encoder.layers.*.linear" in found.stdout
    assert "--meft-update=fix" in found.stdout


def test_its_workflow_is_the_documented_one() -> None:
    """But for the cells of a sweep, which it has none of."""
    workflow = (EXAMPLE / ".github" / "workflows" / "memory.yml").read_text()
    documented = (EXAMPLE.parents[1] / "docs" / "ci.md").read_text()
    for line in workflow.splitlines():
        assert line in documented or "python -m pytest" in line
