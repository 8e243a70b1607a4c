"""What memory grows with, at the sizes of papers, on a GPU that is not there."""

import functools
from typing import Any

import pytest
import torch

from harness.tiny import cell
from meft.reversible.packing import packed_bytes
from meft_bench.child.worker import run
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.source import Source
from meft_bench.virtual.prediction.plan import MemoryPlan, plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)
BATCH, TOKENS, WIDTH = 16, 512, 1024
"""Of RoBERTa-large."""


@functools.cache
def step(method: str, depth: int, **changes: Any) -> Measurement:
    fields: dict[str, Any] = {"backbone": "random:roberta-large", "dtype": "bf16"}
    fields |= {"device": "virtual-H200", "batch_size": BATCH, "seq_len": TOKENS}
    outcome = run(cell(method=method, depth=depth, **fields | changes), ChildOptions())
    assert outcome["status"] == "ok", outcome["message"]
    measured: Any = outcome["measurement"]
    return Measurement(**measured)


@functools.cache
def planned(method: str) -> MemoryPlan:
    return plan(
        cell(
            method=method,
            backbone="random:roberta-large",
            depth=6,
            dtype="bf16",
            device="virtual-H200",
            batch_size=BATCH,
            seq_len=TOKENS,
        ),
        Source(),
        margin=0.05,
    )


def per_block(method: str, name: str = "saved_bytes", **changes: Any) -> float:
    """What each of six further blocks adds."""
    low, high = (getattr(step(method, depth, **changes), name) for depth in (6, 12))
    return float(high - low) / 6


@pytest.mark.slow
def test_exact_streams_keep_k_bits_an_element() -> None:
    """And a number for each of two couplings, by which they are checked."""
    bits = packed_bytes(BATCH * TOKENS * WIDTH, 4)
    assert bits == BATCH * TOKENS * WIDTH // 2
    assert per_block("meft1-exact") == bits + 2 * 8


@pytest.mark.slow
def test_streams_of_floats_keep_nothing() -> None:
    assert per_block("meft1") <= 64


@pytest.mark.slow
def test_checkpoints_keep_an_input_a_block() -> None:
    """In the dtype of the weights."""
    element = {"fp32": 4, "bf16": 2}
    for dtype, size in element.items():
        kept = per_block("adapters-checkpointing", weights_dtype=dtype)
        inputs = BATCH * TOKENS * WIDTH * size
        # Each block also keeps the state of random numbers that it began with.
        assert inputs <= kept <= inputs + 8192


def test_frozen_weights_have_no_state() -> None:
    """Two numbers for each that trains, and a count of steps for each parameter."""
    found = planned("lora")
    kinds = found.by_kind
    assert kinds is not None
    assert found.num_trainable_parameters is not None
    assert 8 * found.num_trainable_parameters <= kinds["optimizer"]
    assert kinds["optimizer"] < 9 * found.num_trainable_parameters
    assert kinds["frozen"] > 50 * kinds["parameters"]


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact", "sparse"])
def test_kinds_add_up_to_the_peak(method: str) -> None:
    """The kinds add up to all of it; the rest of what is allocated is blocks' slack."""
    found = planned(method)
    assert found.by_kind is not None
    assert found.allocated_bytes is not None
    assert found.unattributed_bytes is not None
    total = sum(found.by_kind.values()) + found.unattributed_bytes
    assert total == found.allocated_bytes
    assert 0 <= found.unattributed_bytes < 0.01 * found.allocated_bytes
    # By block, by operator and by kind are the same bytes, but for what kernels take.
    workspace = found.by_kind.get("workspace", 0)
    for parts in (found.by_block, found.by_operator):
        assert parts is not None
        assert sum(parts.values()) == sum(found.by_kind.values()) - workspace
    assert found.by_phase is not None
    most = max(found.by_phase.values())
    assert most == sum(found.by_kind.values())


@pytest.mark.slow
def test_sparse_adapters_take_as_much_of_the_device_however_many_neurons() -> None:
    """16 times the neurons, in one budget: all that grows is who was chosen."""

    def peak(method: str, num_neurons: int) -> int:
        found: int | None = step(
            method,
            2,
            num_neurons=num_neurons,
            num_experts=128,
            row_budget_bytes=2**24,
            active_fraction=1024 / num_neurons,
        ).peak_allocated_bytes
        assert found is not None
        return found

    few, many = 1024, 16384
    row_bytes = 2 * WIDTH * 4
    sparse = peak("sparse", many) - peak("sparse", few)
    # A flag and a place for each neuron, of the block at hand.
    assert 0 <= sparse <= 32 * (many - few)
    dense = peak("dense", many) - peak("dense", few)
    assert dense >= 2 * row_bytes * (many - few)
