import weakref
from typing import Any

import pytest
import torch

import meft
from library.models import batch, classifier, only_stack, reversible
from meft.testing import check_reversible, saved_bytes, tolerance


def test_saved_bytes_counts_each_storage_once() -> None:
    """x * x and x.sin() both save x: 4 KiB, not 12; an excluded storage counts 0."""
    x = torch.randn(1024, requires_grad=True)
    with saved_bytes() as counter:
        out = (x * x, x.sin(), x[:10] * x[:10])
    assert counter.total == 4096
    with saved_bytes(exclude=[x]) as counter:
        out = (x * x, x.sin(), x[:10] * x[:10])  # noqa: F841
    assert counter.total == 0


def test_nothing_is_saved_without_grad() -> None:
    """A forward under `no_grad` keeps nothing for backward."""
    model = reversible(2, variant="meft1")
    with torch.no_grad(), saved_bytes() as counter:
        model(**batch())
    assert counter.total == 0


def test_checking_leaves_no_trace() -> None:
    """Gradients, parameters and the generator are as before."""
    model = reversible(2, dropout=0.1, variant="meft3")
    parameters = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    inputs = batch()
    torch.set_rng_state(state)
    check_reversible(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), parameters))


def test_the_report_reads_as_a_table() -> None:
    """One row per block, the lost ones marked."""
    report = check_reversible(
        reversible(12, variant="meft3", arithmetic="float"), batch()
    )
    rows = str(report).splitlines()
    assert len(rows) == 13
    assert rows[1].endswith("lost")
    assert not rows[12].endswith("lost")


def is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that computes something else in the backward ruins that block's
    gradient, and the check says so."""
    options: dict[str, Any] = {"arithmetic": "float", "scale_1": 1.0, "scale_2": 1.0}
    model = reversible(3, variant="meft1", **options)
    adapter = only_stack(model).adapters_of(2)["reversible"]
    plain: Any = adapter.forward
    monkeypatch.setattr(
        adapter,
        "forward",
        lambda x: plain(x) + (0.5 if is_in_backward() else 0.0),
    )
    report = check_reversible(model, batch())
    assert report.reconstruction_error[2] > 0.01
    assert max(report.reconstruction_error) > tolerance(torch.float32, 3)


def test_the_batch_must_give_a_loss() -> None:
    """Without labels there is nothing to differentiate, and the error says so."""
    inputs = batch()
    del inputs["labels"]
    with pytest.raises(meft.UnsupportedCallError, match="labels"):
        check_reversible(reversible(1, variant="meft1"), inputs)
    with pytest.raises(meft.UnsupportedModelError, match="make_reversible"):
        check_reversible(classifier(1), batch())


def test_tolerance_knows_dtype_depth_and_scale() -> None:
    """It grows with depth and with smaller scales, and shrinks with precision."""
    assert tolerance(torch.float64, 4) < tolerance(torch.float32, 4)
    assert tolerance(torch.float32, 4) < tolerance(torch.float32, 8)
    assert tolerance(torch.float32, 4) < tolerance(torch.float32, 4, 0.1, 1.0)


def test_what_was_counted_is_let_go() -> None:
    """Softmax keeps its output, which may not keep itself by way of the counter."""
    with saved_bytes() as counter:
        out = torch.randn(4, 4, requires_grad=True).softmax(-1)
        assert counter.total == out.untyped_storage().nbytes()
    memory = weakref.ref(out.untyped_storage())
    del out
    assert memory() is None


def test_what_a_dead_branch_saved_does_not_count() -> None:
    """Its storage may be that of a later tensor, and would be counted at random."""
    weight = torch.randn(64, 64, requires_grad=True)
    size = 64 * 64 * 4
    found = []
    for _ in range(5):
        with saved_bytes([weight]) as counter:
            for _ in range(3):
                (weight * 2).exp().sum()  # no output depends on it
            kept = (weight * 2).exp().sum()
            found.append((counter.held, counter.total))
        del kept
        assert counter.held == 0
    assert found == [(size, size)] * 5


def test_outputs_need_not_be_kept() -> None:
    """The most that was held at a time is counted."""
    weight = torch.randn(64, 64, requires_grad=True)
    with saved_bytes([weight]) as counter:
        (weight * 2).exp().exp().sum()
    assert counter.total == 2 * 64 * 64 * 4
