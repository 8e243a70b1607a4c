import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import meft_bench
from meft_bench.parent.engines import environment

NVML = (
    "nvmlInit",
    "nvmlShutdown",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetHandleByUUID",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetName",
    "nvmlDeviceGetUUID",
)


class NVMLError(Exception):
    """What NVML raises."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """NVML on a machine of two GPUs, in place of this machine's."""
    names = ("GPU A", "GPU B")

    def by_index(index: int) -> int:
        if index not in range(len(names)):
            raise NVMLError("no such device")
        return index

    fake = Mock(
        spec_set=[*NVML, "NVMLError"],
        NVMLError=NVMLError,
        nvmlDeviceGetCount=Mock(return_value=len(names)),
        nvmlDeviceGetHandleByIndex=Mock(side_effect=by_index),
        nvmlDeviceGetHandleByUUID=Mock(side_effect=["GPU-aaaa", "GPU-bbbb"].index),
        nvmlDeviceGetMemoryInfo=Mock(side_effect=[Mock(free=9), Mock(free=7)] * 9),
        nvmlDeviceGetName=Mock(side_effect=names.__getitem__),
        nvmlDeviceGetUUID=Mock(side_effect=["GPU-aaaa", "GPU-bbbb"].__getitem__),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_free_memory_of_gpus(nvml: Mock) -> None:
    """As NVML sees it; 0, which no cell fits into, where NVML cannot tell."""
    assert [gpu.free_bytes for gpu in environment.gpus()] == [9, 7]
    nvml.nvmlDeviceGetMemoryInfo.side_effect = NVMLError("not supported")
    assert [gpu.free_bytes for gpu in environment.gpus()] == [0, 0]
    assert environment.gpu_names() == ["GPU A", "GPU B"]


def test_fake_is_faithful() -> None:
    """The fake has no function that the real NVML package lacks."""
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in (*NVML, "NVMLError") if not hasattr(pynvml, name)] == []


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """git in a new repository that is the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def call(*words: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", *who, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    call("init", "--quiet")
    return call


def collect(device: str = "cpu") -> Any:
    """The environment of this machine."""
    return environment.collect(num_threads=2, num_slots=3, device=device)


def test_collect() -> None:
    """An environment names versions, sources and machine, and imports no torch."""
    here = collect()
    assert (here.num_threads, here.num_slots) == (2, 3)
    assert here.versions["python"] == sys.version.split()[0]
    assert set(here.versions) <= {"python", *environment.PACKAGES}
    assert here.machine == f"{here.cpu}, {environment.num_cores()} cores"
    assert len(here.code_sha256) == 64
    assert here == collect()


def test_packages_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is left out rather than given a made-up version."""
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-distribution",))
    assert environment.versions().keys() == {"python"}


def test_digest(tmp_path: Path) -> None:
    """The digest depends on the sources, and not on their folder or other files."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "inner").mkdir(parents=True)
        (folder / "a.py").write_text("a = 1\n")
        (folder / "inner" / "b.py").write_text("b = 1\n")
    first = environment.digest({"package": one})
    assert environment.digest({"package": two}) == first
    assert environment.digest({"other": one}) != first
    (one / "notes.toml").write_text("")
    assert environment.digest({"package": one}) == first
    (one / "inner" / "b.py").write_text("b = 2\n")
    assert environment.digest({"package": one}) != first
    (two / "inner" / "b.py").rename(two / "b.py")
    assert environment.digest({"package": two}) != first


def test_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a checkout there is no commit, and no claim of being clean."""
    shutil.copytree(Path(meft_bench.__file__).parent, tmp_path / "meft_bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        environment, "source_folders", lambda: {"meft_bench": tmp_path / "meft_bench"}
    )
    assert (collect().commit, collect().dirty) == (None, None)


def test_checkout(
    tmp_path: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout is named only by sources that are the same as its own.

    The sources run from an environment inside the checkout, as under tox.
    """
    theirs = tmp_path / "benchmarks" / "meft_bench"
    ours = tmp_path / ".tox" / "site-packages" / "meft_bench"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("a = 1\n")
    (tmp_path / "README.md").write_text("hello\n")
    git("add", "benchmarks", "README.md")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")
    monkeypatch.setattr(environment, "source_folders", lambda: {"meft_bench": ours})
    assert (collect().commit, collect().dirty) == (head, False)
    (tmp_path / "README.md").write_text("changed\n")
    assert (collect().commit, collect().dirty) == (head, True)
    (ours / "a.py").write_text("a = 2\n")
    assert (collect().commit, collect().dirty) == (None, None)


def test_the_project_is_the_checkout_of_the_folder(
    tmp_path: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed suite has no commit of its own, and is inside of the project's."""
    installed = tmp_path / ".venv" / "meft_bench"
    shutil.copytree(Path(meft_bench.__file__).parent, installed)
    monkeypatch.setattr(
        environment, "source_folders", lambda: {"meft_bench": installed}
    )
    assert environment.project(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "model.py").write_text("a = 1\n")
    git("add", "model.py")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    found = collect()
    assert found.commit is None
    assert (found.project_commit, found.project_dirty) == (head, False)
    (tmp_path / "model.py").write_text("a = 2\n")
    assert environment.project(tmp_path) == (head, True)


def test_gpu(nvml: Mock) -> None:
    """On a GPU the machine is the GPU's model; on the CPU it is not."""
    assert environment.gpu_names() == ["GPU A", "GPU B"]
    assert collect("cuda").machine == "GPU A"
    assert "GPU" not in collect("cpu").machine
    assert nvml.nvmlInit.call_count == nvml.nvmlShutdown.call_count > 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["GPU B"]),
        ("1,0", ["GPU B", "GPU A"]),
        ("GPU-bbbb", ["GPU B"]),
        ("", []),
        ("-1", []),
        ("7", []),
        ("0,7,1", ["GPU A"]),
        ("1,-1,0", ["GPU B"]),
        ("GPU-b", ["GPU B"]),
        ("GPU-", []),
        ("GPU-cccc", []),
        ("0,GPU-aaaa", []),
        (" 1 , 0", ["GPU B", "GPU A"]),
        ("none", []),
    ],
)
def test_visible_gpus(
    nvml: Mock, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    """A GPU that is hidden from CUDA is not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.gpu_names() == names
    hidden = f"none is left by CUDA_VISIBLE_DEVICES={visible!r}"
    assert environment.why_no_gpu() == ("" if names else hidden)
    assert nvml.nvmlInit.call_count == nvml.nvmlShutdown.call_count > 0


def test_no_driver(nvml: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, or without the NVML package, there are no GPUs, and no fuss."""
    nvml.nvmlInit.side_effect = NVMLError("no driver")
    assert environment.gpu_names() == []
    assert environment.why_no_gpu() == "NVML sees none: no driver"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert environment.gpu_names() == []
    assert environment.why_no_gpu().startswith("cannot tell without `python -m pip")


@pytest.mark.parametrize(
    "file", ["methods.toml", "measurements.toml", "backbones.toml"]
)
def test_data_that_the_code_computes_with_are_part_of_its_digest(
    tmp_path: Path, file: str
) -> None:
    """The tables, next to the package or inside it, and files of GPUs."""
    package = tmp_path / "meft_bench"
    gpus = package / "virtual" / "device" / "gpus"
    gpus.mkdir(parents=True)
    (package / "cell.py").write_text("")
    table, one = tmp_path / file, gpus / "mine.json"
    table.write_text("[full]")
    one.write_text("{}")
    before = environment.digest({"meft_bench": package})
    table.rename(package / file)
    assert environment.digest({"meft_bench": package}) == before
    (package / file).write_text("[head]")
    after = environment.digest({"meft_bench": package})
    one.write_text("{ }")
    assert len({before, after, environment.digest({"meft_bench": package})}) == 3
