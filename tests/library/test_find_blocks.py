"""Blocks that are not what their family's description says."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import meft
from library.families import CASES, Case, assert_same_bits, gradients, twin_of
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
    """Its own forward computes something else, which the first batch finds."""
    model = QWEN.build()
    block = blocks_of(model)[index]

    class Doubled(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    block.__class__ = Doubled
    convert(model)
    with pytest.raises(meft.UnsupportedModelError, match="a Doubled, does not compute"):
        model(**QWEN.batch())


@pytest.mark.parametrize("convert", CONVERT)
def test_a_class_derived_from_a_listed_one_is_taken(
    convert: Callable[[nn.Module], object],
) -> None:
    """If it computes the same."""
    model = QWEN.build()
    for block in blocks_of(model):

        class Named(type(block)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        block.__class__ = Named
    convert(model)
    model(**QWEN.batch())


@pytest.mark.parametrize("convert", CONVERT)
@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_patched_class_is_compared(
    factor: float,
    wraps: bool,
    convert: Callable[[nn.Module], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As libraries do that replace the forward of blocks for all models: refused if it
    computes something else, also if it is replaced after the first batch."""
    model = QWEN.build()
    kind: Any = type(blocks_of(model)[0])
    original = kind.forward
    convert(model)
    model(**QWEN.batch())

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) * factor

    new = functools.wraps(original)(patched) if wraps else patched
    monkeypatch.setattr(kind, "forward", new)
    if factor == 1:
        model(**QWEN.batch())
        return
    with pytest.raises(
        meft.UnsupportedModelError, match=r"Qwen3.* does not compute what"
    ):
        model(**QWEN.batch())


def test_a_tower_whose_hidden_states_are_read_is_left_as_it_is() -> None:
    """LLaVA reads the second last of its image tower; its language model is converted,
    and gradients are those of the twin."""
    text = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    images = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=images, text_config=text, image_token_index=19)
    model = LlavaForConditionalGeneration(config).train()
    names = [found.name for found in find_blocks(model)]
    assert names == ["model.language_model.layers"]
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    batch = {
        "input_ids": torch.tensor([[1, 19, 19, 19, 19, 2, 3]]),
        "pixel_values": torch.randn(1, 3, 8, 8),
        "labels": torch.tensor([[1, 1, 1, 1, 1, 2, 3]]),
    }
    rebuilt = gradients(model, batch)
    assert_same_bits(rebuilt, gradients(twin_of(model), batch))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_classes_as_transformers_wrote_them_are_taken(case: Case) -> None:
    with torch.device("meta"):
        assert find_blocks(case.build(1))
