"""Sparse adapters on a GPU that is not there: rows move as on a real one."""

from collections import Counter
from typing import Any

import pytest
import torch

from harness.tiny import BLOCKS, HIDDEN, batch, cell, classifier
from marks import slow_but_for
from meft.sparse.adapter import sparse_adapters
from meft_bench.child.meters.rows import RowTraffic, TrafficMeter
from meft_bench.child.training.steps import Stepper
from meft_bench.child.worker import run
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.registry import METHODS, load
from meft_bench.virtual.device import gpu
from meft_bench.virtual.emulation import assumed_activation
from meft_bench.virtual.emulation.virtual_gpu import VirtualGpu
from meft_bench.virtual.recording.ledger import Ledger

pytestmark = [
    pytest.mark.usefixtures("no_garbage_collection"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
    ),
]
NEURONS = 256
SPARSE = [m for m in METHODS if m.startswith("sparse") or m == "dense-offload"]
OFFLOADED = [m for m in SPARSE if not m.endswith("resident")]
SHAPE = {"num_neurons": NEURONS, "num_experts": 16, "top_k_neurons": 16}


def ready(method: str, **changes: Any) -> Stepper:
    here = cell(method=method, **SHAPE | {"top_k_experts": 2} | changes)
    model = load(METHODS[method])(classifier("llama"), here)
    stepper = Stepper(model.to(here.device), here)
    stepper.model.train()
    return stepper


def uncounted(num_bytes: int) -> None:
    """What AdamW reads and writes on the host is not looked at."""


def moved(stepper: Stepper, num_batches: int = 2) -> RowTraffic:
    """By one step in the long run, as the engine's own books tell."""
    batches = [batch() for _ in range(num_batches)]
    for _ in range(2):
        stepper.step(batches, 1e-3)
    meter = TrafficMeter(list(sparse_adapters(stepper.model).values()))
    stepper.step(batches, 1e-3)
    return meter.result()


@pytest.mark.parametrize(
    "method", slow_but_for(OFFLOADED, "dense-offload", "sparse-experts")
)
def test_every_byte_that_moves_is_in_the_engines_books(method: str) -> None:
    """Compared with a ledger of all copies; other than rows only batches are copied,
    and single numbers, by which torch's clipping combines norms and its factor."""
    with (
        VirtualGpu(gpu.find("H200")),
        assumed_activation.rows(0.5, uncounted),
        Ledger() as ledger,
    ):
        stepper = ready(method, device="cuda")
        batches = [batch()] * 2
        for _ in range(2):
            stepper.step(batches, 1e-3)
        meter = TrafficMeter(list(sparse_adapters(stepper.model).values()))
        started = ledger.time
        stepper.step(batches, 1e-3)
        books = meter.result()
    found: Counter[str] = Counter()
    for copy in ledger.trace().copies:
        if copy.time > started and copy.num_bytes > 4:
            found[copy.direction] += copy.num_bytes
    kept = ("input_ids", "attention_mask", "labels")
    inputs = sum(each[name].nbytes for each in batches for name in kept)
    assert books.h2d_bytes is not None
    assert found["h2d"] - inputs == books.h2d_bytes > 0
    assert found["d2h"] == books.d2h_bytes


def test_where_every_neuron_answers_fake_rows_move_as_real_ones_do() -> None:
    """No choice is left to values, so both books are the same to the byte."""
    real = moved(ready("dense-offload"))
    with VirtualGpu(gpu.find("H200")), assumed_activation.rows(0.1, uncounted):
        fake = moved(ready("dense-offload", device="cuda"))
    assert fake == real
    assert fake.union_fraction == [1.0] * BLOCKS


@pytest.mark.parametrize(
    "method",
    slow_but_for(["sparse", "sparse-experts", "sparse-experts-union"], "sparse"),
)
def test_what_is_declared_is_what_is_active(method: str) -> None:
    def found(fraction: float) -> RowTraffic:
        with VirtualGpu(gpu.find("H200")), assumed_activation.rows(fraction, uncounted):
            return moved(ready(method, device="cuda"))

    half, all_of_them = found(0.5), found(1.0)
    assert half.union_fraction == [0.5] * BLOCKS
    assert all_of_them.union_fraction == [1.0] * BLOCKS
    assert half.d2h_bytes is not None
    assert all_of_them.d2h_bytes is not None
    # Gradients of half the rows stay away.
    row_bytes = 2 * HIDDEN * 4
    saved = all_of_them.d2h_bytes - half.d2h_bytes
    assert saved == BLOCKS * row_bytes * NEURONS // 2


def test_no_more_is_active_than_tokens_can_keep() -> None:
    with VirtualGpu(gpu.find("H200")), assumed_activation.rows(1.0, uncounted):
        found = moved(ready("sparse", device="cuda", top_k_neurons=1))
    tokens = batch()["input_ids"].numel()
    assert found.union_fraction == [tokens / NEURONS] * BLOCKS


@pytest.mark.parametrize(
    "method", slow_but_for(SPARSE, "dense-offload", "sparse-experts")
)
def test_a_cell_of_each_is_predicted(method: str) -> None:
    fields: dict[str, Any] = SHAPE | {"top_k_experts": 2, "active_fraction": 0.25}
    outcome = run(
        cell(
            method=method,
            device="virtual-H200",
            backbone="random:bert-tiny",
            **fields,
        ),
        ChildOptions(),
    )
    assert outcome["status"] == "ok", outcome["message"]
    measured: Any = outcome["measurement"]
    environment: Any = outcome["environment"]
    assert "activates 25% of a block's neurons" in environment["prediction"]
    share = 1.0 if method == "dense-offload" else 0.25
    assert set(measured["union_fraction"]) == {share}
    assert measured["row_store_bytes"] > 0
    is_resident = method.endswith("resident")
    assert (measured["h2d_bytes"] is None) == is_resident


def test_the_memory_traffic_of_the_host_is_that_of_gathering_and_of_adamw() -> None:
    """Worked by hand: of every neuron, in FP32, without a 16-bit copy.

    A forward computes the current value of each row from the row and both moments (12
    bytes a number) into what is sent (4), which a copy reads (4). In an update, a copy
    writes the gradient (4), and AdamW reads it and reads and writes the others (28).
    """
    device = VirtualGpu(gpu.find("H200"))
    with device, assumed_activation.rows(1.0, device.add_host_traffic):
        ledger = device.new_ledger()
        with ledger:
            stepper = ready("dense-offload", device="cuda")
            for _ in range(2):
                stepper.step([batch()], 1e-3)
            before = ledger.touched_by_host.copy()
            stepper.step([batch()], 1e-3)
    found = ledger.touched_by_host - before
    rows, numbers = BLOCKS * NEURONS, BLOCKS * NEURONS * 2 * HIDDEN
    of_indices = 256 * rows
    assert 20 * numbers <= found["forward"] < 20 * numbers + of_indices
    assert 32 * numbers <= found["update"] < 32 * numbers + of_indices
    assert found["backward"] < of_indices
