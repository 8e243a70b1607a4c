"""Training on a GPU that is not there."""

import contextlib
import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harness.tiny import BLOCKS, FAMILIES, batch, cell, classifier
from marks import slow_but_for
from meft_bench.child import backbones
from meft_bench.child.tasks.batches import Example, Image, full_batches
from meft_bench.child.training import prepare
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS, TASKS, load
from meft_bench.shared.source import Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation import cuda_backend, virtual_gpu
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.prediction import predict
from meft_bench.virtual.recording import ledger
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Trace

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
]
FAITHFUL = ("full", "lora", "adapters", "checkpointing", "meft1", "meft1-exact")


def h200() -> VirtualGpu:
    return VirtualGpu(gpu.find("H200"))


def steps(method: str, model_type: str, device: str, optimizer: str = "adamw") -> Trace:
    """Two steps of a small classifier, under a ledger."""
    here = cell(method=method, device=device, optimizer=optimizer)
    with Ledger() as book:
        model = load(METHODS[method])(classifier(model_type), here)
        stepper = Stepper(model.to(device), here)
        stepper.model.train()
        book.watch(stepper.model, stepper.optimizer)
        for _ in range(2):
            stepper.step([batch()], 1e-3)
    return book.trace()


@pytest.mark.parametrize(
    ("method", "model_type"),
    slow_but_for(
        itertools.product(FAITHFUL, FAMILIES),
        ("full", "llama"),
        ("meft1-exact", "bert"),
    ),
)
def test_fake_and_real_tensors_take_the_same_memory(
    method: str, model_type: str
) -> None:
    """Both on a CPU, whose kernels both then choose: to the byte."""
    steps(method, model_type, "cpu")  # libraries keep constants from first use on
    real = steps(method, model_type, "cpu").peak("cpu")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        patches = (virtual_gpu._values, virtual_gpu._masks, virtual_gpu._moving_modules)
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(*patch())
            fake = steps(method, model_type, "cpu").peak("cpu")
    assert fake.by_kind == real.by_kind
    assert fake.num_bytes == real.num_bytes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_trains_on_a_gpu_that_is_not_there(model_type: str) -> None:
    with h200() as device:
        trace = steps("full", model_type, "cuda")
    assert trace.peak("cuda").num_bytes > 0
    assert device.attention_counts
    optimizer = sum(
        s.num_bytes for s in trace.storages if trace.kind_of(s) == "optimizer"
    )
    weights = sum(
        s.num_bytes
        for s in trace.storages
        if trace.kind_of(s) == "parameters" and s.died is None and s.device == "cuda"
    )
    assert optimizer >= 2 * weights


@pytest.mark.parametrize(
    ("optimizer", "num_kept", "num_made"),
    [("adamw", 2, 1), ("adamw-fused", 2, 0), ("sgd", 0, 1)],
)
def test_an_optimizer_keeps_and_makes_copies_of_matrices(
    optimizer: str, num_kept: int, num_made: int
) -> None:
    """Two moments of AdamW are kept. An update makes AdamW's denominators or SGD's
    decayed gradients, of all matrices at once; one kernel for all makes nothing."""
    with h200():
        trace = steps("full", "bert", "cuda", optimizer)
    found = dict.fromkeys(("parameters", "optimizer", "update"), 0)
    for storage in trace.storages:
        kind = trace.kind_of(storage)
        is_matrix = storage.device == "cuda" and len(storage.shape) > 1
        if is_matrix and kind in found and storage.step == 0:
            found[kind] += storage.num_bytes
    assert found["parameters"] > 0
    assert found["optimizer"] == num_kept * found["parameters"]
    assert found["update"] == num_made * found["parameters"]


def test_figures_of_memory_are_the_ledgers() -> None:
    """What is held now and at the most, reserved or not, and what is left."""
    with h200() as device, device.new_ledger():
        before = torch.cuda.memory_allocated()
        tensor = torch.ones(2**20, device=device.backend.device)
        double = tensor + tensor
        del tensor
        now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        reserved = torch.cuda.memory_reserved()
        free, total = torch.cuda.mem_get_info()
        assert now - before == double.nbytes
        assert most - before == 2 * double.nbytes
        assert reserved == torch.cuda.max_memory_reserved() > most
    assert total == device.gpu.memory_bytes
    assert free == total - reserved - device.gpu.context_bytes


def test_the_same_every_time() -> None:
    with h200():
        first = steps("full", "bert", "cuda")
    with h200():
        second = steps("full", "bert", "cuda")
    assert first.events == second.events


def test_nothing_stays_patched() -> None:
    before = _patched_places()
    with h200():
        assert torch.cuda.is_available()
        assert _patched_places() != before
    assert _patched_places() == before
    assert not torch.cuda.is_available()
    assert torch.accelerator.current_accelerator() is None
    with pytest.raises(RuntimeError), h200():
        raise RuntimeError
    assert _patched_places() == before


def test_a_real_gpu_is_left_alone() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        pytest.raises(cuda_backend.ShimError, match="real GPU"),
        cuda_backend.fake_cuda(),
    ):
        pass


# Traps: each of these goes wrong without one of the patches.


def test_optimizers_step_all_tensors_at_once() -> None:
    """And so hold one more copy of the weights at their peak, as on a GPU."""

    def update_bytes() -> int:
        with Ledger() as book:
            model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to("cuda")
            optimizer = torch.optim.AdamW(model.parameters())
            book.watch(model, optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            trace = book.trace()
        weights = sum(p.numel() * 4 for p in model.parameters())
        return trace.peak("cuda").by_kind.get("update", 0) - weights

    with h200():
        assert update_bytes() >= 0
    with (
        mock.patch.object(virtual_gpu, "_many_tensors_at_once", return_value=[]),
        h200(),
    ):
        assert update_bytes() < 0


def test_gradients_are_added_in_place() -> None:
    """A dispatch mode keeps autograd from it; backward would take more."""

    def made_by_adding() -> int:
        with h200(), Ledger() as book:
            weight = torch.randn(256, 256, device="cuda", requires_grad=True)
            (weight @ weight @ weight).sum().backward()
        added = [s for s in book.trace().storages if s.operator == "aten.add.Tensor"]
        return len(added)

    assert made_by_adding() == 0
    with mock.patch.object(ledger, "is_accumulation", return_value=False):
        assert made_by_adding() > 0


def test_backward_of_an_activation_is_one_operator() -> None:
    """A build without CUDA has steps for it only, and would hold what each makes."""

    def made_by_backward() -> list[str]:
        with h200(), Ledger() as book:
            x = torch.zeros(64, 64, device="cuda", requires_grad=True)
            nn.functional.silu(x).sum().backward()
        made = [s for s in book.trace().storages if s.phase == "backward"]
        return [s.operator for s in made if s.shape == (64, 64)]

    assert made_by_backward() == ["aten.silu_backward.default"]
    parts = contextlib.nullcontext()
    with mock.patch.object(virtual_gpu, "_whole_operators", return_value=parts):
        assert len(made_by_backward()) > 3


def test_all_operators_that_would_be_taken_apart_are_known() -> None:
    """Those with steps, and with kernels for a CPU, which a CUDA build has for GPUs."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    both = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
        and has_kernel(name, "CompositeImplicitAutograd")
        and has_kernel(name, "CPU")
    }
    # The last has a kernel for CPUs alone.
    known = {*virtual_gpu.WHOLE_OPERATORS, "native_channel_shuffle"}
    assert both == {f"aten::{name}" for name in known}


def test_a_mask_without_padding_is_no_mask() -> None:
    """transformers would take fake tensors for tracing, and give attention a mask."""

    def kernels() -> dict[str, int]:
        with VirtualGpu(gpu.find("A100-80GB")) as device:
            model = classifier("bert").to("cuda", torch.bfloat16)
            model(**{k: v.to("cuda") for k, v in batch().items()})
        return device.attention_counts

    assert kernels() == {"flash": BLOCKS}
    with mock.patch.object(virtual_gpu, "_masks", return_value=[]):
        assert kernels() == {"efficient": BLOCKS}


def test_tied_weights_are_one() -> None:
    """transformers' own way not to draw weights would leave them two."""
    with h200():
        config = transformers.OPTConfig(
            num_hidden_layers=1, hidden_size=32, ffn_dim=64, num_attention_heads=2
        )
        with torch.device("cuda"):
            model = transformers.OPTForCausalLM(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_attention_keeps_no_scores() -> None:
    """A CPU build has the plain kernel only, which keeps all of them."""
    shape = (2, 4, 512, 64)

    def kept() -> tuple[int, dict[str, int]]:
        with h200() as device, Ledger() as book:
            q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            q.requires_grad_()
            out = nn.functional.scaled_dot_product_attention(q, q, q)
            held = book.trace().peak("cuda").num_bytes
            del out
        return held, device.attention_counts

    held, counts = kept()
    assert counts == {"cudnn": 1}
    scores = 2 * 4 * 512 * 512 * 2
    assert held < scores
    with mock.patch.object(virtual_gpu, "_attention", return_value=[]):
        assert kept()[0] > scores


def _patched_places() -> list[Any]:
    """What the personality changes, as it is now."""
    optimizer = __import__("torch.optim.optimizer", fromlist=["_"])
    return [
        {n: getattr(torch.cuda, n) for n in dir(torch.cuda) if not n.startswith("__")},
        {n: getattr(nn.init, n) for n in dir(nn.init)},
        nn.functional.scaled_dot_product_attention,
        [t for t in optimizer._foreach_supported_types if t is FakeTensor],
        torch.utils.swap_tensors,
        vars(transformers.masking_utils)["is_tracing"],
    ]


def test_a_cell_is_predicted_by_the_worker_that_measures() -> None:
    """From its shapes, and says so; a GPU too small for it is out of memory."""
    outcome = run(
        cell(device="virtual-A100-80GB", backbone="random:bert-tiny"), ChildOptions()
    )
    assert outcome["status"] == "ok", outcome["message"]
    measured: Any = outcome["measurement"]
    peaks = ("saved_bytes", "model_state_bytes", "peak_allocated_bytes")
    saved, model_state, allocated = (measured[name] for name in peaks)
    assert 0 < saved < allocated <= measured["peak_reserved_bytes"]
    assert model_state < allocated
    assert measured["score"] is None
    environment: Any = outcome["environment"]
    assert environment["device_name"] == "NVIDIA A100-SXM4-80GB"
    assert "held against an H200" in environment["prediction"]
    large = cell(
        device="virtual-RTX3090-24GB",
        backbone="random:bert-tiny",
        batch_size=60_000,
        seq_len=512,
    )
    outcome = run(large, ChildOptions())
    assert outcome["status"] == "oom"
    assert "no room for a segment" in str(outcome["message"])


@pytest.mark.parametrize(
    ("backbone", "task", "seq_len"),
    [
        ("bert-tiny", "synthetic", 16),
        ("llama-tiny", "synthetic-lm", 16),
        ("vit-tiny", "synthetic", None),
    ],
)
def test_a_batch_is_of_the_shape_that_trains(
    backbone: str, task: str, seq_len: int | None
) -> None:
    """Held against the batches of the worker that measures."""
    here = cell(backbone=f"random:{backbone}", task=task, accumulation=2)
    config, _ = backbones.load_config(here, Source())
    shape = backbones.image_shape(config)
    if seq_len is None:
        assert shape is not None
        row: Any = Image(pixels=torch.zeros(shape), label=0)
    else:
        here = dataclasses.replace(here, seq_len=seq_len)
        label: Any = [0] * seq_len if task.endswith("lm") else 0
        tokens = [0] * seq_len
        row = Example(token_ids=tokens, segment_ids=tokens, label=label)
    num_labels = prepare.num_labels_of(load(TASKS[task])(here, Source()))
    real = full_batches([row], here)
    fake = predict._batches(here, shape, num_labels)
    assert [[(n, t.shape, t.dtype) for n, t in each.items()] for each in fake] == [
        [(n, t.shape, t.dtype) for n, t in each.items()] for each in real
    ]
