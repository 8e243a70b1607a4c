"""What a peak consists of, as records keep it."""

from typing import Any

import pytest
import torch
from torch import nn

from harness.tiny import cell
from meft_bench.child.measuring.measure import measure
from meft_bench.child.measuring.partial_result import PartialResult
from meft_bench.shared import breakdown as kept
from meft_bench.shared.source import Source
from meft_bench.virtual.prediction.predict import predict
from meft_bench.virtual.recording.breakdown import NUM_ROWS, breakdown
from meft_bench.virtual.recording.ledger import Ledger

pytestmark = pytest.mark.usefixtures("no_garbage_collection")
SOURCE = Source(allow_download=False)


def test_a_step_by_hand() -> None:
    """Two layers of 1 MiB, of which the blocks' numbers are not told apart."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU())
    model.append(nn.Linear(512, 512, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)
    inputs = torch.ones(128, 512)
    with Ledger(accelerator="cpu", round_bytes=1) as ledger:
        ledger.watch(model, optimizer)
        start = ledger.mark()
        model(inputs).sum().backward()
        optimizer.step()
    found = breakdown(ledger.trace(), start)
    kept.check(found)
    assert found["phase"] == "backward"
    assert 0 < found["at_op"] < found["num_ops"]
    rows = [row[:8] for row in found["rows"]]
    size = (2 * 2**20, 2)
    assert ["parameters", "", "*", "", "float32", [512, 512], *size] in rows
    mm = "aten.mm.default"
    assert ["gradients", "backward", "*", mm, "float32", [512, 512], *size] in rows
    assert found["other_bytes"] == 0


def test_memory_of_libraries_is_a_row() -> None:
    """As far as no storage that is known has it."""
    model = nn.Linear(512, 512, bias=False)
    with Ledger(accelerator="cpu", round_bytes=512) as ledger:
        ledger.watch(model)
        ledger.add_unattributed(2**20 + 4096)
        ledger.add_unattributed(2**20)  # all of it is known
        start = ledger.mark()
        model(torch.ones(128, 512)).sum().backward()
    found = breakdown(ledger.trace(), start)
    kept.check(found)
    rows = [row[:8] for row in found["rows"] if row[0] == "unattributed"]
    assert rows == [["unattributed", "", "", "", "uint8", [4096], 4096, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "meft1-exact"])
def test_rows_add_up_to_the_peak_of_a_gpu(method: str) -> None:
    """But for what kernels allocate and free within one operator."""
    partial = PartialResult()
    one = cell(method=method, backbone="random:bert-base", device="cuda")
    measure(one, SOURCE, partial)
    found = partial.memory_breakdown
    assert found is not None
    measured = partial.measurement.peak_allocated_bytes
    assert found["peak_bytes"] == pytest.approx(measured, rel=0.01)
    assert "unattributed" in {row[0] for row in found["rows"]}


METHODS = ("full", "lora", "meft1-exact", "checkpointing", "sparse-experts")


@pytest.mark.parametrize("method", METHODS)
def test_rows_add_up_to_the_peak_that_is_measured(method: str) -> None:
    """But for what no storage has, and rows of sparse adapters in host memory."""
    partial = PartialResult()
    measure(cell(method=method, backbone="random:llama-tiny"), SOURCE, partial)
    found = partial.memory_breakdown
    kept.check(found)
    assert found is not None
    assert len(found["rows"]) <= NUM_ROWS
    measured = partial.measurement.peak_allocated_bytes
    if method == "sparse-experts":
        assert found["peak_bytes"] > measured
    else:
        assert found["peak_bytes"] == pytest.approx(measured, rel=0.003)
    saved = partial.measurement.saved_bytes
    assert found["saved_bytes"] >= 0.9 * saved


@pytest.mark.parametrize("method", METHODS)
def test_rows_add_up_to_the_peak_that_is_predicted(method: str) -> None:
    """Of a virtual GPU, whose allocator may make a block up to 1 MiB larger."""
    partial = PartialResult()
    one = cell(method=method, backbone="random:llama-tiny", device="virtual-H200")
    predict(one, SOURCE, partial)
    found = partial.memory_breakdown
    kept.check(found)
    assert found is not None
    predicted = partial.measurement.peak_allocated_bytes
    assert 0 <= predicted - found["peak_bytes"] < 4 * 2**20


def broken(**changes: Any) -> dict[str, Any]:
    row = ["saved", "forward", "a", "aten.mm.default", "float32", [2], 8, 1, 3]
    whole: dict[str, Any] = {"peak_bytes": 10, "at_op": 3, "num_ops": 5}
    whole |= {"phase": "forward", "rows": [row], "other_bytes": 2}
    whole |= {"saved_bytes": 9, "saved_rows": [row], "saved_other_bytes": 1}
    return whole | changes


def test_a_breakdown_is_checked() -> None:
    kept.check(broken())
    for changes, words in (
        ({"peak_bytes": 11}, "add up to 10 bytes, and its `peak_bytes` is 11"),
        ({"rows": [["saved"]]}, "a row of a breakdown has the entries kind, phase"),
        ({"rows": "many"}, "`rows` = 'many'"),
        ({"saved_bytes": 8}, "`saved_rows` of a breakdown add up to 9 bytes"),
        ({"more": 1}, "has the fields peak_bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            kept.check(broken(**changes))
    with pytest.raises(ValueError, match="has the fields"):
        kept.check([])
