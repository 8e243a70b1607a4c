"""Descriptions of GPUs: one JSON file each in `gpus/`, or a file of the user.

A calibration changes a file, not code. This module imports no heavy dependency.
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
CONSUMER = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of GPUs with fewer threads and less shared memory.

On these, flash attention supports fewer head sizes in backward.
"""
ONE_WORKSPACE = Version("2.13.0.dev0")
"""First version of torch in which cuBLASLt uses the workspace of cuBLAS."""


class GpuError(ValueError):
    """Raised for an unknown GPU or an invalid file; the message states what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Description of one GPU; rates are the vendor's, for dense operands."""

    name: str
    """Name as `torch.cuda.get_device_name` returns it."""
    compute_capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int
    half_flops_per_second: float
    """Rate for 16-bit floats."""
    tf32_flops_per_second: float
    fp32_flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Rate between host and device, in each direction."""
    host_bytes_per_second: float | None = None
    """Rate of the host's memory; None if not known, and then it takes no time."""
    cudnn_version: int
    attention_order: tuple[str, ...]
    """Order in which `scaled_dot_product_attention` tries its kernels."""
    cublas_workspace_bytes: int
    cublaslt_workspace_bytes: int
    """Kept for each thread that multiplies matrices, as that of cuBLAS.

    In torch 2.13 and later, cuBLASLt uses the workspace of cuBLAS instead.
    """
    context_bytes: int
    """Approximate memory that the driver and its libraries use before the first tensor.
    """
    source: str
    """Source of the values: where they were read or measured, and when."""
    compared: str = ""
    """Who measured memory on such a GPU that predictions were compared with.

    `us`, or `others`, who published it; empty if predictions were not compared.
    """

    evidence: str = ""
    """How close predictions were, and in how many numbers of what kind."""

    @property
    def basis(self) -> str:
        """What predictions for it rest on, in words."""
        on_it = {
            "us": "",
            "others": f" and compared with what others measured on a {self.name}",
        }.get(self.compared, f" and not compared with a real {self.name}")
        found = f": {self.evidence}" if self.evidence else ""
        return (
            f"by rules that were held against an H200{on_it}{found} "
            "(docs/virtual-gpu.md)"
        )

    @property
    def max_threads_per_multiprocessor(self) -> int:
        """Maximum number of threads on a multiprocessor, as CUDA documents it."""
        if self.compute_capability == (7, 5):
            return 1024
        return 1536 if self.compute_capability in CONSUMER else 2048

    @property
    def computes_in_bf16(self) -> bool:
        """Whether it multiplies BF16 matrices; older GPUs emulate that in FP32."""
        return self.compute_capability >= (8, 0)


def library_bytes(gpu: Gpu, torch_version: str) -> tuple[int, int]:
    """Return the bytes that cuBLAS and cuBLASLt keep for each thread.

    Only threads that multiply matrices count. `CUBLAS_WORKSPACE_CONFIG` holds pairs of
    a size in KiB and a count, as in `:4096:8`.

    Args:
        gpu: the GPU whose defaults apply if the variable is not set.
        torch_version: version of torch, which decides whether cuBLASLt has its own.

    Returns:
        Bytes of cuBLAS and bytes of cuBLASLt.
    """
    found = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    own = sum(1024 * int(size) * int(count) for size, count in found)
    is_one = Version(torch_version) >= ONE_WORKSPACE
    lt = 0 if is_one else gpu.cublaslt_workspace_bytes
    return own or gpu.cublas_workspace_bytes, lt


def names() -> list[str]:
    """Return the names of the GPUs that are included in the harness."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name: str) -> Gpu:
    """Return the GPU for a name, an unambiguous prefix of a name, or a JSON file.

    Raises:
        GpuError: see `resolve`; or the file does not describe a GPU.
    """
    name = resolve(name)
    return _read(Path(name) if name.endswith(".json") else FOLDER / f"{name}.json")


def name_in(device: str) -> str:
    """Return the GPU's name, as `find` accepts it, from the `device` of a cell."""
    return device.removeprefix(VIRTUAL)


def resolve(name: str) -> str:
    """Return the full name of a GPU, or the absolute path of a JSON file.

    Raises:
        GpuError: no name, or more than one, begins with `name`.
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
    optional = {"compared", "evidence", "host_bytes_per_second"}
    if not isinstance(fields, dict) or not wanted - optional <= set(fields) <= wanted:
        given = set(fields) if isinstance(fields, dict) else set()
        wrong = {"missing": wanted - optional - given, "unknown": given - wanted}
        texts = [
            f"{word} fields: {', '.join(sorted(map(str, names)))}"
            for word, names in wrong.items()
            if names
        ]
        raise GpuError(f"{path}: {'; '.join(texts)}")
    for field in dataclasses.fields(Gpu):
        if field.name in fields:
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


MOST = 1e30
"""Maximum of any rate."""


def _check(path: Path, name: str, kind: object, value: Any) -> None:
    """Raise `GpuError` unless the JSON `value` is valid for the field `name`."""
    if name == "compute_capability":
        words = "two integers"
        fits = isinstance(value, list) and [*map(type, value)] == [int, int]
    elif name == "attention_order":
        words = "a list of names"
        fits = isinstance(value, list) and {*map(type, value)} <= {str}
    elif name == "compared":
        words = "'us', 'others' or ''"
        fits = value in ("us", "others", "")
    elif kind is str:
        words, fits = "text", isinstance(value, str)
    elif kind is int:
        words, fits = "an integer, 0 or more", type(value) is int and value >= 0
    else:
        words = "a number above 0 and of at most 1e30"
        fits = type(value) in (int, float) and 0 < value <= MOST
    if not fits:
        raise GpuError(f"{path}: `{name}` = {value!r} should be {words}")
