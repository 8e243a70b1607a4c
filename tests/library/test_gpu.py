"""What only a GPU can show; the arithmetic has its tests on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import meft
from library import sparse
from library.models import batch, gradients, only_stack, reversible

pytestmark = pytest.mark.gpu

variants = pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])


@variants
def test_the_allocator_holds_the_same_after_a_forward_at_any_depth(
    variant: str,
) -> None:
    """What a forward leaves allocated does not depend on the number of blocks."""
    held = []
    for depth in (2, 8):
        model = reversible(depth, dropout=0.1, variant=variant, arithmetic="float")
        nn.Module.cuda(model)
        encoder = only_stack(model)
        hidden = torch.randn(4, 16, 16, device="cuda")
        encoder(hidden)  # library workspaces are allocated by the first forward
        encoder._first_step_is_over = True  # the probe's samples are the first step's
        before = torch.cuda.memory_allocated()
        out = encoder(hidden)
        held.append(torch.cuda.memory_allocated() - before)
        del out
    assert held[0] == held[1]


@variants
def test_dropout_is_replayed_by_the_devices_own_generator(variant: str) -> None:
    """With dropout on, the rebuilt gradients are the twin's, bit for bit."""
    model = reversible(4, 0.3, variant=variant)
    nn.Module.cuda(model)
    inputs = {name: rows.cuda() for name, rows in batch().items()}
    rebuilt = gradients(model, inputs)
    only_stack(model).backward_pass = "store"
    for name, expected in gradients(model, inputs).items():
        assert torch.equal(rebuilt[name], expected), name


def sparse_step(model: PreTrainedModel) -> list[float]:
    """Losses of four steps on the device."""
    optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
    losses = []
    for inputs in sparse.batches(4):
        loss = model(**{n: t.cuda() for n, t in inputs.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_rows_in_host_memory_train_as_rows_on_the_device() -> None:
    """To rounding: their Adam is another kernel there."""
    models = [sparse.sparse_model(placement=p) for p in ("offloaded", "resident")]
    for model in models:
        nn.Module.cuda(model)
    away, here = (sparse_step(model) for model in models)
    torch.testing.assert_close(torch.tensor(away), torch.tensor(here))
    rows = sparse.all_rows(models[0])
    assert not rows.is_cuda
    torch.testing.assert_close(rows, sparse.all_rows(models[1]).cpu())


@pytest.mark.parametrize("engine", [{}, {"cache": "off"}, {"device_bytes": 60_000}])
def test_the_profiler_sees_the_bytes_that_the_ledger_books(
    engine: dict[str, Any], tmp_path: Path
) -> None:
    """All but single numbers, by which torch learns the size of a result; and never
    from or to memory that is not pinned."""
    model = sparse.sparse_model(**engine)
    nn.Module.cuda(model)
    optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
    (inputs,) = sparse.batches(1)
    on_device = {name: tensor.cuda() for name, tensor in inputs.items()}

    def step() -> None:
        model(**on_device).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    step()
    ledger = sparse.engine_of(model).ledger
    ledger.clear()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    copies = [e for e in trace["traceEvents"] if e.get("cat") == "gpu_memcpy"]
    large = [copy for copy in copies if copy["args"]["bytes"] > 8]
    assert not [copy["name"] for copy in large if "Pageable" in copy["name"]]
    moved = {
        way: sum(copy["args"]["bytes"] for copy in large if way in copy["name"])
        for way in ("HtoD", "DtoH")
    }
    small = 8  # the size of a gradient, where it was clipped on the host
    assert abs(moved["HtoD"] - ledger.h2d_bytes) <= small * sparse.DEPTH
    assert abs(moved["DtoH"] - ledger.d2h_bytes) <= small * sparse.DEPTH


def test_device_memory_does_not_grow_with_the_number_of_neurons() -> None:
    """With 16 times the neurons in one budget, by a tenth of what rows add at most."""
    peaks = []
    row_bytes = []
    for neurons in (1024, 16384):
        model = sparse.plain_model(hidden_size=256)
        # As many neurons of an expert, since all of those chosen are scored.
        fields = {"num_neurons": neurons, "num_experts": neurons // 8}
        config = sparse.config(**fields, device_bytes=4_000_000)
        meft.add_sparse_adapters(model, config)
        rows = sparse.all_rows(model)
        row_bytes.append(rows.numel() * rows.element_size())
        nn.Module.cuda(model)
        sparse_step(model)
        torch.cuda.reset_peak_memory_stats()
        sparse_step(model)
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    # Keys of experts, and which row is where, do grow.
    assert peaks[1] - peaks[0] < 0.1 * (row_bytes[1] - row_bytes[0])
