"""Properties of the GPU: memory, overhead of driver and libraries, and rates.

On a virtual GPU, the same quantities are those of its JSON file.
"""

import os
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from meft_bench.shared.nvml import NvmlGpu
from meft_bench.virtual.device.gpu import Gpu
from meft_bench.virtual.validation.place import CheckFigure, Place

NUM_BYTES = 2**30
"""Number of bytes copied to measure a rate."""
SIDE = 8192
"""Side of the square matrices multiplied to measure a rate."""
NUM_REPEATS = 10


def figures(place: Place) -> Iterator[CheckFigure]:
    """Yield capacity, context, libraries and rates."""
    known = _known(place.virtual.gpu) if place.virtual else _measured()
    for case, quantity, value in known:
        yield CheckFigure(case=case, quantity=quantity, value=value)


def _known(gpu: Gpu) -> Iterator[tuple[str, str, int | float | str]]:
    yield "properties", "name", gpu.name
    yield "properties", "memory_bytes", gpu.memory_bytes
    yield "properties", "num_multiprocessors", gpu.num_multiprocessors
    yield "properties", "compute_capability", "{}.{}".format(*gpu.compute_capability)
    yield "properties", "cudnn_version", gpu.cudnn_version
    yield "properties", "attention_order", " ".join(gpu.attention_order)
    yield "after first kernels", "context_bytes", gpu.context_bytes
    yield "rates", "memory_bytes_per_second", gpu.memory_bytes_per_second
    yield "rates", "bf16_flops_per_second", gpu.half_flops_per_second
    yield "rates", "tf32_flops_per_second", gpu.tf32_flops_per_second
    yield "rates", "fp32_flops_per_second", gpu.fp32_flops_per_second
    yield "rates", "host_to_device_bytes_per_second", gpu.link_bytes_per_second
    yield "rates", "device_to_host_bytes_per_second", gpu.link_bytes_per_second


def _measured() -> Iterator[tuple[str, str, int | float | str | None]]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle)
    yield "before the context", "nvml_total_bytes", int(before.total)
    yield "before the context", "nvml_used_bytes", int(before.used)
    torch.cuda.init()
    torch.cuda.synchronize()

    def taken() -> int:
        """Return the bytes that are neither free nor reserved by torch's allocator."""
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        return int(before.free) - free - torch.cuda.memory_reserved()

    yield "after the context", "context_bytes", taken()
    yield "after the context", "free_bytes", torch.cuda.mem_get_info()[0]
    properties = torch.cuda.get_device_properties(0)
    yield "properties", "name", properties.name
    yield "properties", "memory_bytes", properties.total_memory
    yield "properties", "num_multiprocessors", properties.multi_processor_count
    yield "properties", "compute_capability", f"{properties.major}.{properties.minor}"
    yield "properties", "cudnn_version", torch.backends.cudnn.version()
    yield "properties", "attention_order", _attention_order()
    yield "properties", "cuda_version", torch.version.cuda
    yield "properties", "driver", str(pynvml.nvmlSystemGetDriverVersion())

    square = torch.randn(1024, 1024, device="cuda")
    yield "after an element-wise kernel", "context_bytes", taken()
    square @ square
    yield "after a product in float32", "context_bytes", taken()
    half = square.bfloat16()
    functional.linear(half, half, half[0])
    yield "after products in bfloat16", "context_bytes", taken()
    _attend_and_normalise()
    yield "after attention and norms", "context_bytes", taken()
    _step_of_optimizer()
    yield "after first kernels", "context_bytes", taken()
    processes = NvmlGpu(pynvml, handle).processes().value or {}
    yield "after first kernels", "nvml_process_bytes", processes.get(os.getpid())
    yield "after first kernels", "reserved_bytes", torch.cuda.memory_reserved()
    pynvml.nvmlShutdown()
    yield from _rates()


def _attention_order() -> str:
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    order = torch._C._get_sdp_priority_order()
    return " ".join(names.get(int(one), str(one)) for one in order)


def _attend_and_normalise() -> None:
    query = torch.randn(
        2, 8, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        backend = getattr(torch.nn.attention.SDPBackend, kernel)
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                out = functional.scaled_dot_product_attention(query, query, query)
        except RuntimeError:  # not supported on this GPU
            continue
        out.sum().backward()
    functional.layer_norm(query.float(), (64,)).sum().backward()


def _step_of_optimizer() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    optimizer = torch.optim.AdamW([weight])
    functional.cross_entropy(weight, torch.arange(64, device="cuda")).backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()


def _rates() -> Iterator[tuple[str, str, float]]:
    device = torch.randint(0, 255, (NUM_BYTES,), dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    yield (
        "rates",
        "memory_bytes_per_second",
        _rate(2 * NUM_BYTES, lambda: other.copy_(device)),
    )
    yield (
        "rates",
        "host_to_device_bytes_per_second",
        _rate(NUM_BYTES, lambda: device.copy_(host, non_blocking=True)),
    )
    yield (
        "rates",
        "device_to_host_bytes_per_second",
        _rate(NUM_BYTES, lambda: host.copy_(device, non_blocking=True)),
    )
    square = torch.randn(SIDE, SIDE, device="cuda")
    half = square.bfloat16()
    num_flops = 2 * SIDE**3
    yield "rates", "bf16_flops_per_second", _rate(num_flops, lambda: half @ half)
    yield "rates", "fp32_flops_per_second", _rate(num_flops, lambda: square @ square)
    torch.backends.cuda.matmul.allow_tf32 = True
    yield "rates", "tf32_flops_per_second", _rate(num_flops, lambda: square @ square)
    torch.backends.cuda.matmul.allow_tf32 = False


def _rate(amount: int, do: Callable[[], object]) -> float:
    """Return `amount` per second of the fastest repeat, after one warm-up run."""
    do()
    best = float("inf")
    for _ in range(NUM_REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        do()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return amount / best
