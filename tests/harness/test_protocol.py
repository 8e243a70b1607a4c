"""Training by the protocol equals steps written out with torch alone.

A constant that is changed by mistake, in `protocol` or on its way to torch, fails a
test of this file.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.tiny import HIDDEN, SHAPE, batch, cell, classifier
from meft.sparse.adapter import SparseAdapter, sparse_adapters
from meft.sparse.dense import DenseAdapter
from meft_bench.child.training.steps import Stepper, learning_rate_at
from meft_bench.shared import protocol
from meft_bench.shared.registry import METHODS, load
from meft_bench.virtual.device import gpu

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_prints_the_constants() -> None:
    """docs/numbers.md has a table with a row per constant: its name and its value."""
    text = (DOCS / "numbers.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    found = {name: value for name, value in vars(protocol).items() if name.isupper()}
    assert rows == [(name, repr(value)) for name, value in found.items()]


def small() -> Any:
    """A classifier without dropout."""
    return classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def by_hand(model: nn.Module, num_steps: int, factor: float) -> list[float]:
    """Train as the protocol says, written out with nothing but torch.

    Returns:
        The norm of the gradient of each step, before clipping.
    """
    named = list(model.named_parameters())
    vectors = [p for n, p in named if n.endswith("bias") or "LayerNorm" in n]
    matrices = [p for n, p in named if not any(p is v for v in vectors)]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    norms = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            # 6 % of 50 steps are 3.
            rising, falling = step / 3, (50 - step) / 47
            group["lr"] = 1e-2 * (rising if step < 3 else falling)
        optimizer.zero_grad()
        for _ in range(2):
            (factor * model(**batch()).loss / 2).backward()
        norm = torch.stack(
            [p.grad.norm() for _, p in named if p.grad is not None]
        ).norm()
        norms.append(float(norm))
        if norm > 1.0:
            for _, parameter in named:
                assert parameter.grad is not None
                parameter.grad.mul_(1.0 / (norm + 1e-6))
        optimizer.step()
    return norms


@pytest.mark.parametrize(("factor", "is_clipped"), [(1e-3, False), (50.0, True)])
def test_training_takes_the_steps_of_a_plain_loop(
    factor: float, is_clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Betas, epsilon, decay, clipping, schedule and accumulation, held against a loop
    that has the numbers of the paper's code written into it.

    The loss is multiplied by `factor`, lest all gradients be above or below the norm
    that they are clipped to; at the smaller one, epsilon matters.
    """
    plain, model = small().train(), small().train()
    norms = by_hand(plain, 5, factor)
    assert [norm > 1 for norm in norms] == [is_clipped] * 5
    here = cell(max_steps=50, learning_rate=1e-2, accumulation=2)
    stepper = Stepper(model, here)
    loss_of = stepper.loss
    monkeypatch.setattr(stepper, "loss", lambda one: factor * loss_of(one))
    for step in range(5):
        stepper.step([batch(), batch()], learning_rate_at(step, here))
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    for (name, found), wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "adamw-in-backward"])
@pytest.mark.parametrize("method", ["full", "sparse"])
def test_every_adamw_has_the_same_numbers(optimizer: str, method: str) -> None:
    """torch's own, fused or not, and the one that knows rows of sparse adapters."""
    if method == "sparse" and optimizer != "adamw":
        pytest.skip("rows have an AdamW of their own")
    here = cell(method=method, optimizer=optimizer, num_neurons=64)
    groups = Stepper(load(METHODS[method])(classifier("llama"), here), here).optimizer
    found = [(g["betas"], g["eps"], g["weight_decay"]) for g in groups.param_groups]
    assert found == [((0.9, 0.98), 1e-6, 0.1), ((0.9, 0.98), 1e-6, 0.0)]


def test_an_optimizer_runs_as_its_name_says() -> None:
    """One fused kernel, or as torch chooses by default."""
    names = ("adamw", "adamw-fused", "sgd")
    found = {name: Stepper(classifier(), cell(optimizer=name)) for name in names}
    kinds = {name: type(one.optimizer) for name, one in found.items()}
    adamw = torch.optim.AdamW
    assert kinds == {"adamw": adamw, "adamw-fused": adamw, "sgd": torch.optim.SGD}
    assert found["adamw-fused"].optimizer.defaults["fused"] is True
    assert found["adamw"].optimizer.defaults["fused"] is None


def test_plain_sgd_decays_by_the_same_groups() -> None:
    groups = Stepper(classifier(), cell(optimizer="sgd")).optimizer.param_groups
    assert [(g["weight_decay"], g["momentum"]) for g in groups] == [(0.1, 0), (0.0, 0)]


def rows_after_a_step(method: str) -> list[Tensor]:
    """Keys and values side by side, per block."""
    torch.manual_seed(0)
    here = cell(method=method, num_neurons=16)
    model = load(METHODS[method])(classifier("llama"), here)
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        rows = 0.3 * torch.randn(16, 2 * HIDDEN, generator=generator)
        if isinstance(module, SparseAdapter):
            module.rows.store.replace(rows)
        elif isinstance(module, DenseAdapter):
            with torch.no_grad():
                module.keys.copy_(rows[:, :HIDDEN])
                module.values.copy_(rows[:, HIDDEN:])
        else:
            generator.manual_seed(7)
    Stepper(model.train(), here).step([batch()], learning_rate=1e-2)
    if sparse_adapters(model):
        return [a.rows.store.settled() for a in sparse_adapters(model).values()]
    dense = [m for m in model.modules() if isinstance(m, DenseAdapter)]
    return [torch.cat([m.keys.detach(), m.values.detach()], dim=1) for m in dense]


def test_rows_of_sparse_adapters_decay_as_those_of_dense_ones_do() -> None:
    """Both are matrices, whatever the optimizer holds in place of rows elsewhere."""
    found, wanted = rows_after_a_step("dense-offload"), rows_after_a_step("dense")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_loras_alpha_is_twice_the_rank(rank: int) -> None:
    """So its output is multiplied by 2, whatever the rank."""
    here = cell(method="lora", lora_rank=rank)
    model = load(METHODS["lora"])(classifier(), here)
    pairs = [m for m in model.modules() if hasattr(m, "lora_alpha")]
    assert len(pairs) == 2 * SHAPE["num_hidden_layers"]
    for pair in pairs:
        assert pair.lora_alpha == {"default": 2 * rank}
        assert pair.scaling == {"default": 2.0}
        assert pair.lora_A["default"].weight.shape[0] == rank


@pytest.mark.parametrize("name", gpu.names())
def test_what_a_gpu_says_of_itself_fits_together(name: str) -> None:
    """A bandwidth or a memory that is changed by mistake changes every plan."""
    found = gpu.find(name)
    nominal = re.search(r"-(\d+)GB", name)
    if nominal:  # what PyTorch can use is a little less
        share = found.memory_bytes / (int(nominal[1]) * 2**30)
        assert 0.95 < share < 1
    assert found.link_bytes_per_second in (16e9, 32e9, 64e9)  # PCIe 3, 4, 5 by 16
    rates = (found.half_flops_per_second, found.tf32_flops_per_second)
    assert rates[0] >= rates[1] >= found.fp32_flops_per_second
    assert found.computes_in_bf16 or rates[1] == found.fp32_flops_per_second
    # What cuBLAS keeps: 32 MiB on Hopper and Blackwell of data centres, which prefer
    # cuDNN's attention, else :4096:2:16:8.
    major, _ = found.compute_capability
    prefers_cudnn = major in (9, 10)
    assert (found.attention_order[0] == "cudnn") == prefers_cudnn
    assert found.cublas_workspace_bytes == (
        32 * 2**20 if prefers_cudnn else 2**10 * (4096 * 2 + 16 * 8)
    )
    assert "memory" in found.source
    assert "rates" in found.source


def test_weight_decay_leaves_no_parameter_out() -> None:
    """Every one is in one group, one without a dimension among those of none."""
    model = classifier("llama")
    model.scale = nn.Parameter(torch.ones(()))
    decayed, plain = Stepper(model, cell()).optimizer.param_groups
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert any(p is model.scale for p in plain["params"])
