"""The loss in chunks by Liger's kernels, with a replacement for the package."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import meft
from library.losses import divisors, leaves, llama, results, rows, some_labels
from meft.linear_cross_entropy import (
    liger_linear_cross_entropy,
    plain_linear_cross_entropy,
)


def test_without_liger_its_backend_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the model is changed, not at the first step."""
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(
        meft.ConfigError, match=r"CUDA device: `pip install 'meft\[liger\]'"
    ):
        meft.chunk_loss(llama(), backend="liger")


def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `liger-kernel`, its signature (0.8) and the twin's arithmetic."""

    def liger_fused_linear_cross_entropy(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        logits = functional.linear(input, weight, bias).float()
        return functional.cross_entropy(
            logits, target, ignore_index=ignore_index, reduction=reduction
        )

    names = ["liger_kernel", "liger_kernel.transformers"]
    for name in [*names, "liger_kernel.transformers.functional"]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    functions = sys.modules["liger_kernel.transformers.functional"]
    functions.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]


def test_liger_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU is refused at the call, as it may have been about to move."""
    fake_liger(monkeypatch)
    model = meft.chunk_loss(llama(), backend="liger")
    with pytest.raises(meft.UnsupportedCallError, match="got hidden states on cpu"):
        model(**rows())


@divisors
def test_liger_is_called_as_it_wants_to_be(
    monkeypatch: pytest.MonkeyPatch, num_items: Any
) -> None:
    """With its own names for the arguments, on tensors that only say they are on CUDA:
    this shows the call, not the kernel. Its blind spot is refused."""
    fake_liger(monkeypatch)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    inputs, labels = leaves(with_bias=True), some_labels()
    labels[labels == -100] = 5
    options = {"num_items": num_items, "ignore_index": 5}
    expected = results(plain_linear_cross_entropy, inputs, labels, **options)
    got = results(liger_linear_cross_entropy, inputs, labels, **options)
    assert all(map(torch.equal, got, expected))
    hidden, weight, bias = inputs
    with pytest.raises(meft.UnsupportedCallError, match="no gradient"):
        liger_linear_cross_entropy(hidden.detach(), weight, labels, bias)
