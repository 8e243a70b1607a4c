"""What operators make, remembered: the same tensors as torch makes, at less cost."""

from typing import Any

import pytest
import torch
from torch import Tensor

import meft_bench
from harness.tiny import cell
from marks import slow_but_for
from meft_bench.shared.source import Source
from meft_bench.virtual.emulation import virtual_gpu
from meft_bench.virtual.emulation.memo import Memo
from meft_bench.virtual.prediction.predict import ready
from meft_bench.virtual.recording.trace import Trace

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real GPU, which is left alone"
)


def recorded(monkeypatch: pytest.MonkeyPatch, remembers: bool, **fields: Any) -> Trace:
    """The whole recording of three steps; with the memo, most operators are known."""
    if not remembers:
        monkeypatch.setattr(virtual_gpu, "Memo", lambda: None)
    one = cell(device="virtual-H200", seq_len=16, **fields)
    with ready(one, Source(allow_download=False)) as it:
        it.stepper.model.train()
        for _ in range(3):
            it.stepper.step(it.batches_of(16), learning_rate=1e-3)
        memo = it.device.mode.memo
        assert (memo is not None) == remembers
        assert memo is None or memo.num_hits > it.ledger.time / 3
        trace = it.ledger.trace()
        work = (it.ledger.flops.total(), it.ledger.touched.total())
    monkeypatch.undo()
    assert work[0] > 0
    trace.__dict__["work"] = work
    return trace


CELLS: list[dict[str, Any]] = [
    {"backbone": "random:llama-tiny", "method": "lora", "dtype": "bf16"},
    {"backbone": "random:llama-tiny", "method": "sparse", "num_neurons": 64},
    {
        "backbone": "random:llama-tiny",
        "method": "sparse-experts",
        "num_neurons": 64,
        "active_fraction": 0.5,
        "dtype": "bf16",
    },
    {"backbone": "random:bert-tiny", "method": "full"},
    {"backbone": "random:opt-tiny", "method": "checkpointing", "dtype": "fp16"},
    {"backbone": "random:roberta-tiny", "method": "meft1-exact", "dtype": "bf16"},
    {"backbone": "random:bart-tiny", "method": "meft2"},
    {"backbone": "random:mistral-tiny", "method": "full", "attention": "eager"},
]


@pytest.mark.parametrize("fields", slow_but_for(CELLS, *CELLS[:3]))
def test_a_recording_is_the_same(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Every storage with its size, owner and lifetime, every event, every copy."""
    fields = {"task": "synthetic", "top_k_neurons": 16} | fields
    # Libraries make a few constants on the host at their first use.
    recorded(monkeypatch, remembers=True, **fields)
    plain = recorded(monkeypatch, remembers=False, **fields)
    found = recorded(monkeypatch, remembers=True, **fields)
    assert found.__dict__["work"] == plain.__dict__["work"]
    assert found.events == plain.events
    assert found.copies == plain.copies
    assert len(found.storages) == len(plain.storages)
    for one, other in zip(found.storages, plain.storages, strict=True):
        for name in one.__slots__:
            assert getattr(one, name) == getattr(other, name), (name, one, other)


def made_by(call: Any, *, times: int = 3) -> list[tuple[Any, ...]]:
    """Descriptions of the results of calls, of which all but the first are known."""
    found = []
    for _ in range(times):
        out = call()
        outs = out if isinstance(out, tuple | list) else (out,)
        found.append(
            tuple(
                (t.shape, t.stride(), t.dtype, t.device, t.storage_offset())
                for t in outs
                if isinstance(t, Tensor)
            )
        )
    return found


def test_operators_make_what_they_made() -> None:
    """Views share their argument's storage, new tensors none."""
    with meft_bench.virtual_gpu("H200"):
        x = torch.empty(4, 6, 8, device="cuda", dtype=torch.bfloat16)
        y = x.transpose(1, 2)[1:]
        calls = [
            *(lambda: x + 1, lambda: x * y.transpose(1, 2)[0], lambda: x.float()),
            *(lambda: y.contiguous(), lambda: y.reshape(-1), lambda: x.view(24, 8)),
            *(lambda: x.expand(2, 4, 6, 8), lambda: y.split(2, dim=1)),
            lambda: torch.nn.functional.layer_norm(x, (8,)),
            lambda: x.max(dim=1),
            lambda: x.to(torch.float32).sum(),
        ]
        for call in calls:
            first, *rest = made_by(call)
            assert all(one == first for one in rest)
        assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata
        for _ in range(3):
            view = x.view(24, 8)
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_other_scalars_and_default_dtypes_are_other_results() -> None:
    """`x * 2` of integers stays an integer, `x * 2.0` does not."""
    with meft_bench.virtual_gpu("H200"):
        x = torch.ones(4, dtype=torch.long, device="cuda")
        for _ in range(2):
            assert (x * 2).dtype == torch.long
            assert (x * 2.0).dtype == torch.float32
            assert (x * True).dtype == torch.long
        torch.set_default_dtype(torch.float64)
        assert (x * 2.0).dtype == torch.float64


def test_gradients_pass_through_views_that_are_known() -> None:
    with meft_bench.virtual_gpu("H200") as memory:
        weight = torch.nn.Parameter(torch.empty(8, 8, device="cuda"))
        for _ in range(3):
            x = torch.empty(2, 8, device="cuda")
            (x @ weight.t()).view(-1).sum().backward()
            assert weight.grad is not None
            weight.grad = None
        assert memory.plan().allocated_bytes


def test_devices_are_told_apart() -> None:
    """A copy to the GPU is one each time, and a sum on the host stays there."""
    with meft_bench.virtual_gpu("H200"):
        host = torch.empty(4, 6, device="cuda").cpu()
        for _ in range(3):
            assert (host + 1).device.type == "cpu"
            copied = host.to("cuda")
            assert copied.device.type == "cuda"
            assert copied.untyped_storage()._cdata != host.untyped_storage()._cdata


def test_changes_in_place_return_the_argument() -> None:
    """With its version, which autograd counts; a change of its shape is no such."""
    with meft_bench.virtual_gpu("H200"):
        x = torch.empty(4, 6, device="cuda")
        index = torch.zeros(2, dtype=torch.long, device="cuda")
        for step in range(3):
            before = x._version
            assert x.add_(1) is x
            assert x.index_put_((index,), x[:2].clone()) is x
            assert x._version == before + 2
            y = torch.empty(4, 6, device="cuda")
            assert y.t_().shape == (6, 4), step
            assert y.unsqueeze_(0).shape == (1, 6, 4)


def test_an_index_with_a_mask_is_not_known_from_its_shape() -> None:
    """Two masks of one shape select as many elements as each has, or as is assumed."""
    memo = Memo()
    index = torch.ops.aten.index.Tensor
    with torch._subclasses.FakeTensorMode() as mode:
        x = torch.empty(4, 6)
        rows = torch.zeros(3, dtype=torch.long)
        for _ in range(2):
            arguments = (x, [x[:, 0] > 0])
            memo.run(mode, index, arguments, {}, lambda: torch.empty(2, 6))
        assert memo.num_hits == 0
        for _ in range(2):
            memo.run(mode, index, (x, [rows]), {}, lambda: torch.empty(3, 6))
        assert memo.num_hits == 1
