"""The two ways to train on a GPU that is not there: both take the same memory."""

import contextlib
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from harness.tiny import FAMILIES, batch, cell, classifier
from marks import slow_but_for
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS, load
from meft_bench.shared.source import Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation import cpu_backend, cuda_backend, virtual_gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction.plan import MemoryPlan, plan
from meft_bench.virtual.recording.trace import Trace

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
]
SIZE = {"batch_size": 8, "seq_len": 32}


def without_shim() -> contextlib.AbstractContextManager[Any]:
    """As on a build of torch that cannot be patched."""
    error = cuda_backend.ShimError("another order of methods")
    return mock.patch.object(cuda_backend, "fake_cuda", side_effect=error)


def steps(
    method: str, model_type: str, dtype: str = "fp32", attention: str = "sdpa"
) -> Trace:
    """Two of a small classifier, on whichever path there is."""
    with VirtualGpu(gpu.find("H200")) as device, device.new_ledger() as ledger:
        here = cell(method=method, dtype=dtype, device=device.backend.device, **SIZE)
        with torch.device(here.device):  # so that the host never holds weights
            backbone = classifier(model_type, _attn_implementation=attention)
            model = load(METHODS[method])(backbone, here)
        stepper = Stepper(model.to(here.device), here)
        stepper.model.train()
        ledger.watch(stepper.model, stepper.optimizer)
        for _ in range(2):
            stepper.step([batch(**SIZE)], 1e-3)
    return ledger.trace()


NO_PATCH = contextlib.nullcontext()


def check_same_peak(
    method: str,
    model_type: str,
    dtype: str,
    attention: str = "sdpa",
    without: contextlib.AbstractContextManager[Any] = NO_PATCH,
) -> None:
    """No more is between them than what the host holds, which one counts as the GPU's:
    batches, and a number for each parameter that an optimizer steps."""
    shimmed = steps(method, model_type, dtype, attention)
    with without_shim(), without:
        plain = steps(method, model_type, dtype, attention)
    more = plain.peak().num_bytes - shimmed.peak("cuda").num_bytes
    assert 0 <= more <= shimmed.peak("cpu").num_bytes


@pytest.mark.parametrize(
    ("method", "model_type"),
    slow_but_for(
        itertools.product(
            ["full", "lora", "checkpointing", "meft1", "meft1-exact"], FAMILIES
        ),
        ("full", "bert"),
        ("meft1-exact", "llama"),
    ),
)
def test_both_paths_take_the_same(method: str, model_type: str) -> None:
    check_same_peak(method, model_type, "fp32")


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize(
    "method",
    slow_but_for(["full", "lora", "checkpointing", "meft1-exact"], "full"),
)
def test_both_paths_take_the_same_under_autocast(method: str, model_type: str) -> None:
    check_same_peak(method, model_type, "bf16")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_both_paths_take_the_same_by_transformers_own_attention(
    model_type: str, dtype: str
) -> None:
    """Whose softmax autocast computes in float32; in fp16, with a scaled loss."""
    check_same_peak("full", model_type, dtype, "eager")


def dropout_of_a_cpu(tensor: Tensor, p: float, train: bool) -> Tensor:
    return tensor * torch.empty_like(tensor).bernoulli_(1 - p) if train else tensor


WITHOUT: dict[str, tuple[contextlib.AbstractContextManager[Any], str]] = {
    "attention": (
        mock.patch.object(virtual_gpu, "_attention", return_value=[]),
        "sdpa",
    ),
    "dropout": (mock.patch.object(cpu_backend, "_dropout", dropout_of_a_cpu), "sdpa"),
    "float32": (
        mock.patch.multiple(cpu_backend, IN_FLOAT32=(), TO_FLOAT32=()),
        "eager",
    ),
}


@pytest.mark.parametrize("choice", slow_but_for(WITHOUT, "float32"))
def test_each_choice_of_cudas_is_needed(choice: str) -> None:
    """Without any one of them, the pure path is farther off than the host's share."""
    patch, attention = WITHOUT[choice]
    with pytest.raises(AssertionError):
        check_same_peak("full", "bert", "bf16", attention, patch)


def test_optimizers_go_through_lists_of_tensors() -> None:
    """And hold one more copy of all weights; with it, a counter for each of them."""

    def peak_bytes() -> int:
        with VirtualGpu(gpu.find("H200")) as device, device.new_ledger() as ledger:
            place = device.backend.device
            weights = [torch.zeros(64, 64, device=place) for _ in range(16)]
            for weight in weights:
                weight.requires_grad_().grad = torch.zeros_like(weight)
            torch.optim.AdamW(weights).step()
        return ledger.trace().peak().num_bytes

    with_lists = peak_bytes()
    with without_shim():
        assert peak_bytes() - with_lists in range(16 * 512, 18 * 512)
        one_by_one = contextlib.nullcontext()
        with mock.patch.object(
            cpu_backend, "_many_tensors_at_once", return_value=one_by_one
        ):
            assert peak_bytes() <= with_lists - 8 * 64 * 64 * 4


@pytest.mark.parametrize("name", [*cpu_backend.IN_FLOAT32, *cpu_backend.TO_FLOAT32])
def test_autocast_of_cuda_knows_the_operator(name: str) -> None:
    """And that of the CPU does not, so that nothing of it is lost."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"aten::{name}", "AutocastCUDA")
    assert not has_kernel(f"aten::{name}", "AutocastCPU")


def test_autocast_gives_the_same_dtypes() -> None:
    """Of everything that is distinguished, and of what is not."""

    def dtypes() -> list[torch.dtype]:
        with VirtualGpu(gpu.find("H200")) as device:
            place = device.backend.device
            x = torch.zeros(4, 8, device=place, dtype=torch.bfloat16)
            wide = torch.zeros(8, 8, device=place)
            target = torch.zeros(4, dtype=torch.long, device=place)
            with torch.autocast(place, torch.bfloat16):
                results = [
                    functional.layer_norm(x, (8,)),
                    functional.rms_norm(x, (8,)),
                    x.softmax(-1),
                    functional.softmax(x, -1, dtype=torch.bfloat16),
                    functional.log_softmax(x, -1),
                    functional.cross_entropy(x, target),
                    functional.gelu(x),
                    functional.silu(x),
                    functional.linear(x, wide),
                    functional.embedding(target, wide),
                    x @ wide,
                    x.pow(2),
                    x.exp(),
                    x.rsqrt(),
                    x.sum(),
                    x.sum(-1),
                    x.sum(dtype=torch.bfloat16),
                    x.mean(-1),
                    x.cumsum(-1),
                    x.cumsum(-1, dtype=torch.float64),
                    x.double().exp(),
                    target.sum(),
                    x.norm(),
                    x + wide[:4],
                    torch.cat([x, wide]),
                ]
        return [result.dtype for result in results]

    shimmed = dtypes()
    with without_shim():
        assert dtypes() == shimmed


@pytest.mark.parametrize("is_shimmed", [True, False])
def test_nothing_stays_patched(is_shimmed: bool) -> None:
    path = contextlib.nullcontext() if is_shimmed else without_shim()
    before = _patched_places()
    with path, VirtualGpu(gpu.find("H200")) as device:
        expected = cuda_backend.BACKEND if is_shimmed else cpu_backend.BACKEND
        assert device.backend.name == expected.name
        # The reason why the cuda backend could not be used is given.
        assert device.backend.how.startswith(expected.how)
        assert ("another order of methods" in device.backend.how) != is_shimmed
        # What looks for a GPU finds the device on which tensors live.
        assert torch.cuda.is_available() is is_shimmed
        assert _patched_places() != before
    assert _patched_places() == before
    path = contextlib.nullcontext() if is_shimmed else without_shim()
    with pytest.raises(RuntimeError), path, VirtualGpu(gpu.find("H200")):
        raise RuntimeError
    assert _patched_places() == before


def _patched_places() -> list[Any]:
    optimizer = __import__("torch.optim.optimizer", fromlist=["_"])
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    return [
        *(sorted(registered(key)) for key in ("AutocastCPU", "AutogradCPU", "CUDA")),
        {n: getattr(torch.cuda, n) for n in dir(torch.cuda) if not n.startswith("__")},
        vars(FakeTensor).get("is_cuda"),
        optimizer._get_foreach_kernels_supported_devices,
        functional.scaled_dot_product_attention,
        vars(transformers.masking_utils)["is_tracing"],
    ]


def test_no_backend_is_used_with_a_real_gpu() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(cuda_backend.RealGpuError, match="left alone"),
        VirtualGpu(gpu.find("H200")),
    ):
        pass


def test_a_cell_says_which_path_it_took() -> None:
    """And holds the same figures, but for what the host's memory is taken for."""
    here = cell(device="virtual-H200", backbone="random:bert-tiny", dtype="bf16")
    shimmed = run(here, ChildOptions())
    with without_shim():
        plain = run(here, ChildOptions())
    assert plain["status"] == shimmed["status"] == "ok", plain["message"]
    of_shim: Any = shimmed["environment"]
    of_pure: Any = plain["environment"]
    assert of_shim["prediction"].startswith("fake CUDA tensors; by rules")
    assert of_pure["prediction"].startswith("fake CPU tensors")
    assert of_pure["device_name"] == of_shim["device_name"]
    seen: Any = plain["measurement"]
    known: Any = shimmed["measurement"]
    for name in ("saved_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
        assert seen[name] == pytest.approx(known[name], rel=0.01), name


def test_a_plan_without_a_link_knows_no_traffic() -> None:
    """None, which is not 0."""
    here = cell(device="virtual-H200", backbone="random:bert-tiny")
    rows, labels = 3 * 4 * 8 * 8, 4 * 8
    assert plan(here, Source(), margin=0.05).h2d_bytes == rows + labels
    with without_shim():
        found = plan(here, Source(), margin=0.05)
    assert found.verdict == "fits", found.message
    assert found.h2d_bytes is None
    assert found.d2h_bytes is None
    assert found.prediction.startswith("fake CPU tensors")
    assert found.needed_bytes is not None


@pytest.mark.parametrize(
    ("method", "fields", "what"),
    [
        ("sparse", {}, "rows"),
        ("lora-checkpointing-offload", {}, "checkpoints"),
        ("meft1-exact", {"side_buffer": "host"}, "lost bits"),
    ],
)
def test_what_is_kept_on_the_host_needs_a_backend_that_knows_it(
    method: str, fields: dict[str, str], what: str
) -> None:
    """Its bytes would otherwise count as the GPU's."""
    here = cell(
        method=method, device="virtual-H200", backbone="random:bert-tiny", **fields
    )
    with without_shim():
        found = plan(here, Source(), margin=0.05)
    assert found.verdict == "unknown"
    assert f"'{method}' keeps {what} on the host" in found.message


REAL_SIZES: dict[str, dict[str, Any]] = {
    "BERT-base, full, fp32, 16 x 128": {
        "backbone": "random:bert-base",
        "batch_size": 16,
        "seq_len": 128,
    },
    "RoBERTa-large, full, bf16 autocast, 32 x 512": {
        "backbone": "random:roberta-large",
        "dtype": "bf16",
        "batch_size": 32,
        "seq_len": 512,
    },
    "OPT-1.3B, full, bf16 weights, 16 x 512": {
        "backbone": "random:opt-1.3b",
        "dtype": "bf16",
        "weights_dtype": "bf16",
        "batch_size": 16,
        "seq_len": 512,
    },
    "LLaMA-7B, lora, bf16 weights, 16 x 512": {
        "backbone": "random:llama-7b",
        "method": "lora",
        "dtype": "bf16",
        "weights_dtype": "bf16",
        "batch_size": 16,
        "seq_len": 512,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_SIZES)
def test_both_paths_at_real_sizes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints a row of the table in docs/virtual-gpu.md."""

    def planned() -> tuple[int, MemoryPlan]:
        here = cell(device="virtual-H200", **REAL_SIZES[name])
        found = plan(here, Source(), margin=0.05)
        assert found.by_kind is not None, found.message
        return sum(found.by_kind.values()) - found.by_kind["libraries"], found

    shimmed, of_shim = planned()
    with without_shim():
        plain, of_pure = planned()
    assert of_shim.allocated_bytes is not None
    assert of_pure.allocated_bytes is not None
    rates = [
        100 * (one / other - 1)
        for one, other in (
            (plain, shimmed),
            (of_pure.allocated_bytes, of_shim.allocated_bytes),
        )
    ]
    with capsys.disabled():
        print(f"\n| {name} | {shimmed:,} | {plain:,} | {rates[0]:+.4f} % | ", end="")
        print(f"{rates[1]:+.4f} % |")
    assert abs(rates[0]) < 0.05
