"""What is known of a GPU: one JSON file each in `gpus/`, or one of your own.

A calibration changes a file and no code. This module imports nothing heavy.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from meft_bench.shared.registry import VIRTUAL, nearest

FOLDER = Path(__file__).with_name("gpus")
ATTENTION_KERNELS = ("cudnn", "flash", "efficient", "math")
ONE_WORKSPACE = Version("2.13.0.dev0")
"""The torch from which on cuBLASLt works in cuBLAS's workspace."""


class GpuError(ValueError):
    """No such GPU, or a file that describes none; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU; rates are the vendor's, dense, without sparsity."""

    name: str
    """As `torch.cuda.get_device_name` tells it."""
    compute_capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int
    half_flops_per_second: float
    """Of 16-bit floats."""
    tf32_flops_per_second: float
    fp32_flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Between host and device, each way."""
    cudnn_version: int
    attention_order: tuple[str, ...]
    """In which `scaled_dot_product_attention` tries its kernels."""
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    """Both kept for each thread that multiplies matrices; of torch 2.13 and later,
    cuBLASLt takes cuBLAS's."""
    context_bytes: int
    """What the driver and its libraries take before the first tensor; about."""
    source: str
    """Where all this is from: read, or measured, and when."""


def library_bytes(gpu: Gpu, torch_version: str) -> tuple[int, int]:
    """What cuBLAS, and cuBLASLt, keep for each thread that multiplies matrices.

    `CUBLAS_WORKSPACE_CONFIG` holds pairs of KiB and how often, as in `:4096:8`.
    """
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    own = sum(1024 * int(size) * int(count) for size, count in asked)
    is_one = Version(torch_version) >= ONE_WORKSPACE
    lt = 0 if is_one else gpu.cublaslt_workspace_bytes
    return own or gpu.cublas_workspace_bytes, lt


def names() -> list[str]:
    """The GPUs that come with the harness."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name: str) -> Gpu:
    """The GPU of a name, of the beginning of one, or of a JSON file.

    Raises:
        GpuError: as `resolve`, or the file is no GPU's.
    """
    name = resolve(name)
    return _read(Path(name) if name.endswith(".json") else FOLDER / f"{name}.json")


def name_in(device: str) -> str:
    """What `find` knows the GPU by that a cell's `device` names."""
    return device.removeprefix(VIRTUAL)


def resolve(name: str) -> str:
    """The whole name; of a JSON file, its path.

    Raises:
        GpuError: there is none, or several names begin so.
    """
    if name.endswith(".json"):
        return str(Path(name).resolve())
    found = [n for n in names() if n == name] or [
        n for n in names() if n.casefold().startswith(name.casefold())
    ]
    if len(found) != 1:
        several = f"{name!r} may be {' or '.join(found)}" if found else ""
        raise GpuError(
            (several or f"unknown GPU {name!r}; {nearest(name, names())}")
            + "; or the path of a JSON file like those in "
            "meft_bench/virtual/device/gpus"
        )
    return found[0]


def _read(path: Path) -> Gpu:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GpuError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise GpuError(f"{path} is not JSON: {error}") from error
    wanted = {field.name for field in dataclasses.fields(Gpu)}
    if not isinstance(fields, dict) or set(fields) != wanted:
        given = set(fields) if isinstance(fields, dict) else set()
        wrong = {"missing": wanted - given, "unknown": given - wanted}
        texts = [
            f"{word} fields: {', '.join(sorted(map(str, names)))}"
            for word, names in wrong.items()
            if names
        ]
        raise GpuError(f"{path}: {'; '.join(texts)}")
    for field in dataclasses.fields(Gpu):
        _check(path, field.name, field.type, fields[field.name])
    order = tuple(fields["attention_order"])
    if sorted(order) != sorted(ATTENTION_KERNELS):
        raise GpuError(
            f"{path}: attention_order {list(order)} should name each of "
            f"{', '.join(ATTENTION_KERNELS)} once"
        )
    major, minor = fields["compute_capability"]
    return Gpu(
        **fields | {"attention_order": order, "compute_capability": (major, minor)}
    )


def _check(path: Path, name: str, kind: object, value: Any) -> None:
    """Raise `GpuError` unless JSON's `value` is what the field `name` holds."""
    if name == "compute_capability":
        words = "two integers"
        fits = isinstance(value, list) and [*map(type, value)] == [int, int]
    elif name == "attention_order":
        words = "a list of names"
        fits = isinstance(value, list) and {*map(type, value)} <= {str}
    elif kind is str:
        words, fits = "text", isinstance(value, str)
    elif kind is int:
        words, fits = "an integer, 0 or more", type(value) is int and value >= 0
    else:
        words, fits = "a number above 0", type(value) in (int, float) and value > 0
    if not fits:
        raise GpuError(f"{path}: `{name}` = {value!r} should be {words}")
