"""A trace, summed up; on real tensors of a CPU."""

import pytest
import torch
from torch import nn

from harness.tiny import BLOCKS, batch, cell, classifier
from meft_bench.child.training.steps import Stepper
from meft_bench.virtual.recording import views
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import RecordedCopy, Trace

pytestmark = pytest.mark.usefixtures("no_garbage_collection")


def one_step() -> Trace:
    """Of two layers of 1 MiB each, whose input is 256 KiB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU())
    model.append(nn.Linear(512, 512, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)
    with Ledger() as ledger:
        ledger.watch(model, optimizer)
        model(torch.ones(128, 512)).sum().backward()
        optimizer.step()
    return ledger.trace()


def test_each_phase_has_a_peak() -> None:
    """By hand."""
    trace = one_step()
    most = views.peak_by_phase(trace, "cpu")
    assert list(most) == ["inputs", "forward", "backward"]
    assert most["inputs"] == 2 * 2**20  # the weights were there before
    peak = trace.peak("cpu")
    assert max(most.values()) == peak.num_bytes
    # Weights; the input, what the ReLU gives, and the last output; the sum of it.
    assert most["forward"] == 2 * 2**20 + 3 * 2**18 + 512


@pytest.mark.parametrize(
    ("of", "left"),
    [
        ("kind", {"parameters": 2**21, "gradients": 2**21}),
        ("module", {"0": 2**21, "2": 2**21}),
    ],
)
def test_a_timeline_ends_in_what_is_left(of: str, left: dict[str, int]) -> None:
    trace = one_step()
    moments = list(views.timeline(trace, "cpu", of=of))
    assert moments[-1].by_name == left
    totals = [sum(moment.by_name.values()) for moment in moments]
    assert max(totals) == trace.peak("cpu").num_bytes
    assert [m.time for m in moments] == sorted(m.time for m in moments)


def test_what_nothing_is_summed_up_by_is_an_error() -> None:
    with pytest.raises(ValueError, match="'modul'; did you mean 'module'"):
        next(views.timeline(one_step(), "cpu", of="modul"))


@pytest.mark.parametrize("of", views.NAMES)
def test_a_peak_is_the_same_bytes_however_it_is_cut(of: str) -> None:
    trace = one_step()
    peak = trace.peak("cpu")
    parts = views.at_peak(trace, peak, of)
    assert sum(parts.values()) == peak.num_bytes
    assert list(parts.values()) == sorted(parts.values(), reverse=True)


def test_blocks_are_named_by_their_number() -> None:
    found = {
        name: views.block_of(name)
        for name in (
            "",
            "bert.embeddings",
            "bert.encoder.layer.3",
            "bert.encoder.layer.3.attention.self",
            "model.layers.10.mlp",
            "0",
            "conv1.weight",
        )
    }
    assert found == {
        "": "",
        "bert.embeddings": "bert.embeddings",
        "bert.encoder.layer.3": "bert.encoder.layer.3",
        "bert.encoder.layer.3.attention.self": "bert.encoder.layer.3",
        "model.layers.10.mlp": "model.layers.10",
        "0": "0",
        "conv1.weight": "conv1.weight",
    }


def test_blocks_alike_save_as_much() -> None:
    """And none of it is of no block."""
    here = cell(method="full")
    stepper = Stepper(classifier("bert"), here)
    stepper.model.train()
    with Ledger() as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        stepper.step([batch()], 1e-3)
    saved = views.saved_by_block(ledger.trace(), 0, "cpu")
    blocks = [saved[f"bert.encoder.layer.{index}"] for index in range(BLOCKS)]
    assert len(set(blocks)) == 1
    outside = saved.get("", 0) - sum(tensor.nbytes for tensor in batch().values())
    assert outside < 0.01 * sum(saved.values())


def test_copies_are_summed_by_where_they_belong() -> None:
    copies = tuple(
        RecordedCopy(time, direction, 8, phase, module)
        for time, direction, phase, module in (
            (1, "h2d", "forward", "a.0.b"),
            (2, "h2d", "forward", "a.0.c"),
            (3, "d2h", "backward", "a.0.b"),
            (4, "h2d", "forward", "a.1"),
        )
    )
    trace = Trace(storages=(), events=(), copies=copies, round_bytes=1)
    assert views.moved(trace, start=1) == {
        ("d2h", "backward", "a.0"): 8,
        ("h2d", "forward", "a.0"): 8,
        ("h2d", "forward", "a.1"): 8,
    }
