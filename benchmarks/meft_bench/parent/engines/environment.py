"""The environment of a cell, without importing torch: versions, sources, machine.

The parent calls `collect` once per device; the child adds what only it can determine
(the device's name as torch reports it, the origin of weights and data).

Two records may be compared when they come from the same `code_sha256` on the same
`machine`. The digest is over the Python sources of `meft` and `meft_bench` wherever
they are installed, so it is the same for a checkout and for the wheel made from it.
"""

import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meft_bench.shared import distributions, tables
from meft_bench.shared.record import Environment
from meft_bench.shared.registry import VIRTUAL

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "badam",
    "galore-torch",
    "lomo-optim",
    "datasets",
    "evaluate",
    "numpy",
    "safetensors",
    "meft",
)
"""Distributions whose version can change a result."""

_GIT_SECONDS = 10.0


def collect(*, num_threads: int, num_slots: int, device: str) -> Environment:
    """Return the environment of cells that run on `device` of this machine.

    Args:
        num_threads: number of threads each child may use.
        num_slots: number of cells that run in parallel.
        device: `cpu`, `cuda` or a virtual GPU.
    """
    sources = source_folders()
    code_sha256 = digest(sources)
    commit, dirty = _commit(code_sha256, sources)
    project_commit, project_dirty = project(Path.cwd())
    cpu = _cpu_model()
    models = gpu_names() if device == "cuda" else []
    if device.startswith(VIRTUAL):  # the same on any machine
        models = [f"virtual GPU{_of_file(device.removeprefix(VIRTUAL))}"]
    return Environment(
        versions=versions(),
        commit=commit,
        dirty=dirty,
        code_sha256=code_sha256,
        machine=models[0] if models else f"{cpu}, {num_cores()} cores",
        platform=platform.platform(),
        cpu=cpu,
        num_threads=num_threads,
        num_slots=num_slots,
        project_commit=project_commit,
        project_dirty=project_dirty,
    )


def project(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout of a folder, and whether it is dirty.

    Args:
        folder: a folder of the project that is measured.

    Returns:
        The commit and whether tracked files differ from it; None for both where the
        folder is in no checkout, or the checkout has no commit.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    return (None, None) if commit is None else (commit, _is_dirty(folder))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed `PACKAGES`, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        version = distributions.installed(name)
        if version is not None:
            found[name] = version
    return found


def _of_file(name: str) -> str:
    """Return text that identifies the contents of a GPU's JSON file; "" without one."""
    if not name.endswith(".json"):
        return ""
    return f" of file {hashlib.sha256(Path(name).read_bytes()).hexdigest():.12}"


def num_cores() -> int:
    """Return the number of cores this process may use, which a container can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PhysicalGpu:
    """A GPU of this machine."""

    uuid: str
    """The name by which `CUDA_VISIBLE_DEVICES` selects it."""
    model: str
    free_bytes: int = field(default=0, compare=False)
    """Bytes that no process had taken when it was looked at; 0 if NVML cannot tell."""


def gpu_names() -> list[str]:
    """Return the models of the GPUs that a child can use, in NVML's order."""
    return [gpu.model for gpu in gpus()]


def gpus() -> list[PhysicalGpu]:
    """Return the GPUs that a child can use, from NVML.

    `CUDA_VISIBLE_DEVICES`, which NVML itself ignores, is taken into account. The list
    is empty if there is none.
    """
    found, _ = _look_for_gpus()
    return found


def why_no_gpu() -> str:
    """Return why `gpu_names` is empty; "" if it is not."""
    _, reason = _look_for_gpus()
    return reason


def _look_for_gpus() -> tuple[list[PhysicalGpu], str]:
    """Return the GPUs, and why there are none."""
    try:
        import pynvml  # machines without the bench extra lack it
    except ImportError:
        return [], "cannot tell without `python -m pip install nvidia-ml-py`"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"NVML sees none: {error}"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f"none is left by CUDA_VISIBLE_DEVICES={chosen!r}"
    try:
        indices = range(pynvml.nvmlDeviceGetCount())
        every = [_gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in indices]
        found = every if chosen is None else _visible(every, chosen)
    except pynvml.NVMLError as error:
        return [], f"NVML fails: {error}"
    finally:
        pynvml.nvmlShutdown()
    if found:
        return found, ""
    return [], hidden if chosen is not None else "NVML sees none"


def source_folders() -> dict[str, Path]:
    """Return the folders of `meft` and `meft_bench` by name, without importing them."""
    folders = {}
    for name in ("meft", "meft_bench"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders[name] = Path(spec.origin).parent
    return folders


def digest(folders: Mapping[str, Path]) -> str:
    """Return the sha256 over the sources of some packages, names and contents.

    Sources are `.py` files and the data that they compute with: `tables.FILES` and
    the files of GPUs.
    """
    total = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        paths = {path.relative_to(folder).as_posix(): path for path in _sources(folder)}
        for file in tables.FILES if name == "meft_bench" else ():
            table = tables.path_of(folder, file)
            if table.is_file():
                paths[file] = table
        for relative, path in sorted(paths.items()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{name}/{relative} {content}\n".encode())
    return total.hexdigest()


def _sources(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*.py")
    yield from folder.glob("virtual/device/gpus/*.json")


def _commit(
    code_sha256: str, folders: Mapping[str, Path]
) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout of these sources, and whether it is dirty.

    Installed sources are often inside a checkout of another project (for example a
    virtual environment in its folder), and those that tox installs are inside the right
    one. A checkout is accepted when its own copy of the sources is identical, byte for
    byte.
    """
    for place in (folders["meft_bench"], Path.cwd()):
        top = _git(place, "rev-parse", "--show-toplevel")
        if top is None:
            continue
        copies = {
            "meft": Path(top, "meft"),
            "meft_bench": Path(top, "benchmarks", "meft_bench"),
        }
        if digest({name: copies[name] for name in folders}) == code_sha256:
            return _git(place, "rev-parse", "HEAD"), _is_dirty(place)
    return None, None


def _is_dirty(folder: Path) -> bool:
    """Return whether tracked files of a checkout differ from its commit."""
    return _git(folder, "status", "--porcelain", "--untracked-files=no") != ""


def _git(folder: Path, *command: str) -> str | None:
    """Return the output of git, or None: no git, no checkout, no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *command],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu(handle: object) -> PhysicalGpu:
    import pynvml

    try:
        free_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:  # of a GPU that shares the memory of the host
        free_bytes = 0
    return PhysicalGpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        model=str(pynvml.nvmlDeviceGetName(handle)),
        free_bytes=free_bytes,
    )


def _visible(every: Sequence[PhysicalGpu], chosen: str) -> list[PhysicalGpu]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves, as CUDA reads it.

    Entries are indices, UUIDs or beginnings of one UUID. Those from the first one on
    that denotes no GPU are ignored; if one GPU is named twice, there is none.
    """
    found: list[PhysicalGpu] = []
    for entry in map(str.strip, chosen.split(",")):
        if entry.startswith("MIG-"):
            its = [_mig(entry)]
        elif entry.startswith("GPU-"):
            its = [gpu for gpu in every if gpu.uuid.startswith(entry)]
        else:
            its = [gpu for index, gpu in enumerate(every) if str(index) == entry]
        if len(its) != 1:
            break
        found += its
    return found if len(set(found)) == len(found) else []


def _mig(uuid: str) -> PhysicalGpu:
    """Return a part of a GPU, which has a UUID of its own."""
    import pynvml

    return _gpu(pynvml.nvmlDeviceGetHandleByUUID(uuid))
