"""The ledger on real tensors of a CPU; on fake ones, see test_virtual_gpu.py."""

from collections import Counter

import pytest
import torch
from torch import nn

from harness.tiny import batch, cell, classifier
from marks import slow_but_for
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.registry import METHODS, load
from meft_bench.shared.source import MissingError
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Trace

pytestmark = pytest.mark.usefixtures("no_garbage_collection")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def traced(model: nn.Module, num_steps: int = 2) -> Trace:
    """Steps of AdamW on sixteen rows."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with Ledger() as ledger:
        ledger.watch(model, optimizer)
        for _ in range(num_steps):
            model(torch.ones(16, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.trace()


def test_storages_are_counted_from_birth_to_death() -> None:
    """By hand: 4 KB, then 8 more, then 4 less; views are nothing new."""
    with Ledger() as ledger:
        one = torch.empty(1024)
        two = torch.empty(2048)
        view = two.view(2, 1024)[1]
        del one
        three = torch.empty(100)  # a block is a multiple of 512 bytes
        del two
        del view, three
    trace = ledger.trace()
    held = [total for _, _, total, _ in trace.held("cpu")]
    assert held == [4096, 12288, 8192, 8704, 512, 0]
    peak = trace.peak("cpu")
    assert peak.num_bytes == 12288
    assert [s.num_bytes for s in peak.alive] == [8192, 4096]


def test_kinds_are_distinguished_to_the_byte() -> None:
    model = two_layers()
    trace = traced(model)
    weights = sum(p.numel() for p in model.parameters()) * 4
    found: Counter[str] = Counter()
    for storage in trace.storages:
        if storage.died is None or storage.kind == "optimizer":
            found[trace.kind_of(storage)] += storage.num_bytes
    # Steps are counted in a tensor for each of four parameters.
    assert found == {"parameters": weights, "optimizer": 2 * weights + 4 * 4}
    saved = [s for s in trace.storages if trace.kind_of(s) == "saved" and s.step == 1]
    # The input, and what the ReLU gives, which it and the layer after it keep; and two
    # numbers, the loss and its gradient.
    assert sorted(s.num_bytes for s in saved) == [4, 4, 16 * 64 * 4, 16 * 128 * 4]


def test_backward_belongs_to_the_modules_of_its_forward() -> None:
    trace = traced(two_layers())
    made = {
        s.module: s.shape
        for s in trace.storages
        if s.phase == "backward" and s.operator.startswith("aten.mm") and s.step == 1
    }
    assert made["2"] in {(16, 128), (32, 128)}
    assert made["0"] == (128, 64)


def test_flops_are_those_of_the_matrices() -> None:
    """Two a number, forward; in backward as many for weights and for inputs."""
    with Ledger() as ledger:
        two_layers()(torch.ones(16, 64)).sum().backward()
    first, second = 2 * 16 * 64 * 128, 2 * 16 * 128 * 32
    assert ledger.flops.total() == first + second + first + 2 * second
    assert ledger.touched.total() > 2 * 4 * (64 * 128 + 128 * 32)


def test_gradients_add_up_in_place_and_to_the_same_bits() -> None:
    """A weight used twice: autograd adds the second gradient to the first."""

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        weight = torch.randn(256, 256, requires_grad=True)
        (torch.ones(256, 256) @ weight @ weight @ weight).sum().backward()
        assert weight.grad is not None
        return weight.grad

    plain = run()
    with Ledger() as ledger:
        seen = run()
    assert torch.equal(plain, seen)
    adds = [s for s in ledger.trace().storages if s.operator == "aten.add.Tensor"]
    assert not adds


def test_recompute_is_a_forward_inside_backward() -> None:
    torch.manual_seed(0)
    model = two_layers()
    with Ledger() as ledger:
        ledger.watch(model)
        rows = torch.ones(16, 64, requires_grad=True)
        torch.utils.checkpoint.checkpoint(
            model, rows, use_reentrant=False
        ).sum().backward()
    phases = Counter(s.phase for s in ledger.trace().storages)
    assert phases["recompute"] > 0
    assert phases["backward"] > 0


@pytest.mark.parametrize(
    "method",
    slow_but_for(METHODS, "full", "lora-checkpointing", "meft1", "meft1-exact"),
)
def test_nothing_of_a_step_outlives_it(method: str) -> None:
    """Of no method; but for what it declares, in slots and caches of later steps."""
    if "sparse" in method or "dense" in method:
        pytest.skip("slots and host buffers of rows live on, and are counted apart")
    if method == "prefix-tuning":
        pytest.skip("no classifier takes a prefix")
    try:
        stepper = Stepper(load(METHODS[method])(classifier(), cell()), cell())
    except MissingError as error:
        pytest.skip(str(error))  # a package or CUDA that is not here
    stepper.model.train()
    with Ledger() as ledger:
        ledger.watch(stepper.model, stepper.optimizer)
        for _ in range(2):
            stepper.step([batch()], 1e-3)
    trace = ledger.trace()
    left = [
        (s.operator, s.shape, s.module)
        for s in trace.storages
        if s.died is None and trace.kind_of(s) in ("saved", "forward", "recompute")
    ]
    assert not [entry for entry in left if len(entry[1]) > 1]


def test_batches_of_one_step_each_have_a_backward() -> None:
    """What the second forward lets go is not saved; steps are counted by updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with Ledger() as ledger:
        ledger.watch(model, optimizer)
        for _ in range(2):
            for _ in range(2):
                model(torch.ones(16, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ledger.step == 2
    trace = ledger.trace()
    # Of each batch: the input of each layer, the sum, and the gradient it begins with.
    outputs = [s for s in trace.storages if s.operator.startswith("aten.addmm")]
    assert len(outputs) == 2 * 2 * 2
    assert [trace.kind_of(s) for s in outputs] == ["saved", "forward"] * 4
    assert {s.step for s in trace.storages} == {0, 1}


def test_an_update_made_of_another_is_one() -> None:
    """An optimizer whose step calls its base's, both with hooks."""

    class Wrapped(torch.optim.AdamW):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            self.left = torch.ones(256)

    weight = nn.Parameter(torch.ones(4))
    torch.optim.AdamW([weight])  # gives the base's step hooks
    optimizer = Wrapped([weight])
    weight.grad = torch.ones(4)
    with Ledger() as ledger:
        optimizer.step()
    (left,) = (s for s in ledger.trace().storages if s.num_bytes == 1024)
    assert left.phase == "update"
    assert ledger.step == 1
