"""Time and host memory of a prediction: two steps on a virtual H200 and their replay.

Imports are done before. What is aimed at on one core is in `AIM_SECONDS`, and below
1 GB of memory in all; a time is recorded next to it, as machines differ, and memory is
asserted.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from meft_bench.child.meters.memory import host_peak_bytes
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source
from meft_bench.virtual.prediction.predict import ready

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)
AIM_SECONDS = {"roberta-large": 4, "opt-1.3b": 4, "llama-7b": 8, "opt-66b": 15}
AIM_BYTES = 10**9


@pytest.mark.parametrize("method", ["full", "lora", "meft1-exact"])
@pytest.mark.parametrize("shape", AIM_SECONDS)
def test_prediction(benchmark: BenchmarkFixture, shape: str, method: str) -> None:
    """Half weights, 16 x 512 tokens."""
    torch.set_num_threads(1)
    cell = Cell(
        method=method,
        backbone=f"random:{shape}",
        batch_size=16,
        seq_len=512,
        dtype="bf16",
        weights_dtype="bf16",
        device="virtual-H200",
    )

    def predict() -> None:
        with ready(cell, Source()) as it:
            it.stepper.model.train()
            for _ in range(2):
                it.stepper.step(it.batches_of(it.cell.seq_len), learning_rate=1e-3)
            peaks = it.ledger.trace().peak("cuda")
        assert peaks.num_bytes > 0

    benchmark.group = f"prediction, {method}"
    benchmark.pedantic(predict, rounds=3, warmup_rounds=1)
    peak_bytes = host_peak_bytes()
    benchmark.extra_info |= {
        "aim_seconds": AIM_SECONDS[shape],
        "host_peak_bytes": peak_bytes,
    }
    assert peak_bytes is None or peak_bytes < AIM_BYTES
