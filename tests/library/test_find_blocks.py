"""Blocks that are not what their family's description says."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meft
from library.families import CASES, Case
from meft.backbone.find import find_blocks

QWEN = next(case for case in CASES if case.kind == "Qwen3Model")
CONVERT: list[Callable[[nn.Module], object]] = [
    lambda model: meft.make_reversible(model, meft.ReversibleConfig(variant="meft1")),
    lambda model: meft.add_sparse_adapters(
        model, meft.SparseConfig(num_neurons=32, top_k_neurons=4, num_experts=0)
    ),
]


def blocks_of(model: nn.Module) -> list[Any]:
    (found,) = find_blocks(model)
    return found.blocks


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize("index", [1, 2])
def test_one_block_of_another_class_is_refused(
    index: int, convert: Callable[[nn.Module], object]
) -> None:
    """Its own forward would be left out."""
    model = QWEN.build()
    block = blocks_of(model)[index]

    class Doubled(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    block.__class__ = Doubled
    with pytest.raises(meft.UnsupportedModelError, match=f"block {index} .* a Doubled"):
        convert(model)


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize("wraps", [True, False])
def test_a_patched_class_is_refused(
    wraps: bool,
    convert: Callable[[nn.Module], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As libraries do that replace the forward of blocks for all models."""
    model = QWEN.build()
    kind: Any = type(blocks_of(model)[0])
    original = kind.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) * 1.5

    new = functools.wraps(original)(patched) if wraps else patched
    monkeypatch.setattr(kind, "forward", new)
    with pytest.raises(
        meft.UnsupportedModelError, match=r"`forward` of the class Qwen3"
    ):
        convert(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_classes_as_transformers_wrote_them_are_taken(case: Case) -> None:
    with torch.device("meta"):
        assert find_blocks(case.build(1))
