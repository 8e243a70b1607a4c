"""The same questions of sparse adapters in every family and head."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import meft
from library.families import CASES, HIDDEN, Case, assert_same_bits, gradients, objective
from library.sparse import all_rows, config, randomise, row_gradients
from meft.backbone.families import FAMILIES
from meft.backbone.find import find_blocks
from meft.errors import UnsupportedModelError
from meft.sparse.adapter import sparse_adapters
from meft.sparse.convert import remove_sparse_adapters
from meft.sparse.dense import DenseAdapter
from meft.testing import tolerance

NAMES = {family.name for family in FAMILIES if family.takes_parallel_adapter}
SUPPORTED = [c for c in CASES if c.family in NAMES]
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if c.is_slow else ()) for c in SUPPORTED],
    ids=lambda case: case.name,
)
ENDS = {
    "BERT": ("intermediate", "output.dense"),
    "RoBERTa": ("intermediate", "output.dense"),
    "XLM-RoBERTa": ("intermediate", "output.dense"),
    "CamemBERT": ("intermediate", "output.dense"),
    "ELECTRA": ("intermediate", "output.dense"),
    "DistilBERT": ("ffn", "ffn"),
    "Qwen2": ("mlp", "mlp"),
    "Qwen3": ("mlp", "mlp"),
    "Gemma": ("mlp", "mlp"),
    "SmolLM3": ("mlp", "mlp"),
    "Phi-3": ("mlp", "mlp"),
    "OLMo 2": ("mlp", "post_feedforward_layernorm"),
    "Granite": ("mlp", "mlp"),
    "OPT": ("fc1", "fc2"),
    "LLaMA": ("mlp", "mlp"),
    "Mistral": ("mlp", "mlp"),
    "Gemma 2": ("mlp", "post_feedforward_layernorm"),
    "Gemma 3": ("mlp", "post_feedforward_layernorm"),
    "ModernBERT": ("mlp", "mlp"),
    "MPNet": ("intermediate", "output.dense"),
    "DeBERTa": ("intermediate", "output.dense"),
    "DeBERTa-v2": ("intermediate", "output.dense"),
    "GPT-NeoX": ("mlp", "mlp"),
    "Phi": ("mlp", "mlp"),
    "Cohere": ("mlp", "mlp"),
    "StableLM": ("mlp", "mlp"),
    "Falcon": ("mlp", "mlp"),
    "GPT-2": ("mlp", "mlp"),
    "BLOOM": ("mlp", "mlp"),
    "Mixtral": ("mlp", "mlp"),
    "Qwen3-MoE": ("mlp", "mlp"),
}
"""Which module of a block sees the feed-forward's input, and which gives its output."""


def sparse(case: Case, **fields: Any) -> PreTrainedModel:
    model = case.build()
    torch.manual_seed(1)
    meft.add_sparse_adapters(model, config(**fields))
    randomise(model)
    return model


def batch_of(case: Case) -> dict[str, Tensor]:
    """Without padding where the loss looks at it: sparse adapters add nothing there."""
    batch = case.batch()
    if case.kind.endswith(("Model", "QuestionAnswering")):
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return batch


def with_dense_adapters(case: Case, rows: Tensor) -> list[DenseAdapter]:
    """Put there by hooks, which know nothing of halves; the model is kept alive."""
    model = case.build().eval()
    model.requires_grad_(False)
    made = []
    for block, of_block in zip(_blocks(model), rows.split(64), strict=True):
        adapter = DenseAdapter(HIDDEN, 64)
        with torch.no_grad():
            adapter.keys.copy_(of_block[:, :HIDDEN])
            adapter.values.copy_(of_block[:, HIDDEN:])
        seen: list[Tensor] = []
        scale = getattr(block, "residual_multiplier", 1.0)  # after the feed-forward
        first, last = (block.get_submodule(n) for n in ENDS[case.family])
        first.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        last.register_forward_hook(
            lambda m, args, out, seen=seen, adapter=adapter, scale=scale: (
                out + adapter(seen.pop()) / scale
            )
        )
        made.append(adapter)
    objective(model(**batch_of(case))).backward()
    return made


def _blocks(model: PreTrainedModel) -> list[Any]:
    (found,) = find_blocks(model)
    return found.blocks


@every_case
def test_all_neurons_are_a_dense_adapter_next_to_the_feed_forward(case: Case) -> None:
    """Its gradients are."""
    model = sparse(case, num_experts=0, top_k_neurons=64).eval()
    objective(model(**batch_of(case))).backward()
    wanted = [
        torch.cat((a.keys.grad, a.values.grad), 1)  # type: ignore[arg-type]
        for a in with_dense_adapters(case, all_rows(model))
    ]
    found, dense = row_gradients(model), torch.cat(wanted)
    assert dense.any()
    error = (found - dense).abs().max() / dense.abs().max()
    assert error < 10 * tolerance(torch.float32, 3)


@every_case
def test_it_starts_as_the_backbone_and_trains(case: Case) -> None:
    """Dropout on: the halves draw as the block did."""
    plain, model = case.build(), case.build()
    meft.add_sparse_adapters(model, config())
    assert isinstance(model, type(plain))
    losses = []
    for one in (plain, model):
        torch.manual_seed(3)
        losses.append(objective(one(**case.batch())))
    assert torch.equal(*losses)
    optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
    before = all_rows(model).clone()
    objective(model(**case.batch())).backward()
    optimizer.step()
    assert not torch.equal(all_rows(model), before)


@every_case
def test_offloaded_is_resident(case: Case) -> None:
    found = []
    for placement in ("offloaded", "resident"):
        model = sparse(case, placement=placement)
        grads = gradients(model, case.batch())
        found.append(grads | {"rows": row_gradients(model)})
    assert_same_bits(*found)


@every_case
def test_it_can_be_undone(case: Case) -> None:
    plain, model = case.build().eval(), sparse(case).eval()
    remove_sparse_adapters(model)
    assert not sparse_adapters(model)
    wanted = objective(plain(**case.batch()))
    assert torch.equal(objective(model(**case.batch())), wanted)
    assert type(_blocks(model)[0]) is type(_blocks(plain)[0])


@pytest.mark.parametrize("family", ["BART", "ViT", "DeiT"])
def test_other_families_are_refused_with_a_list(family: str) -> None:
    case = next(case for case in CASES if case.family == family)
    with pytest.raises(UnsupportedModelError, match=r"BERT, RoBERTa, .*OPT, .*LLaMA"):
        meft.add_sparse_adapters(case.build(), config())
