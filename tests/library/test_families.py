"""The same questions to every family: is it still the model, and is it exact?"""

import copy
import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import meft
from library.families import (
    CASES,
    DEPTH,
    VOCAB,
    Batch,
    Case,
    assert_same_bits,
    cases,
    gradients,
    objective,
    reversible,
    some_cases,
    twin_of,
)
from marks import pairs, slow_but_for
from meft.backbone.caches import FIELD
from meft.backbone.find import find_blocks
from meft.backbone.heads import new_heads
from meft.reversible.blocks import ReversibleBlocks, find_stacks
from meft.reversible.integer_format import FRACTION_BITS_WIDE
from meft.reversible.packing import packed_bytes
from meft.testing import check_reversible, saved_bytes

every_head = cases()
KINDS = some_cases("Model", "BartForCausalLM")
every_kind = cases("Model", "BartForCausalLM")
every_text_kind = cases(
    "BertModel",
    "RobertaModel",
    "OPTModel",
    "BartModel",
    "BartForCausalLM",
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Gemma2Model",
    "Gemma3TextModel",
    "ModernBertModel",
    "MPNetModel",
    "GPTNeoXModel",
    "PhiModel",
    "CohereModel",
    "StableLmModel",
    "FalconModel",
    "GPT2Model",
    "BloomModel",
    "MBartModel",
    "CLIPTextModel",
)
"""But mixtures of experts: how many tokens an expert is given, padding included, may
decide which kernel multiplies them.
"""

one_head_each = cases("ForSequenceClassification", "ForImageClassification")
variants = pytest.mark.parametrize(
    "variant", slow_but_for(["meft1", "meft2", "meft3"], "meft1", "meft3")
)

ENCODERS = [
    case.kind.replace("ForMaskedLM", "Model")
    for case in CASES
    if case.kind.endswith("ForMaskedLM")
]
"""Models whose positions count from the left."""

QUANTUM = 2.0**-FRACTION_BITS_WIDE


@every_kind
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_are_the_block(
    case: Case, attention: str, dtype: torch.dtype
) -> None:
    """Without adapters attention half and MLP half compute what the block computes, bit
    for bit, dropout included, for what the model's own loop passes to each block."""
    if attention == "sdpa" and not getattr(transformers, case.kind)._supports_sdpa:
        pytest.skip("transformers has none")
    model = nn.Module.to(case.build(attn_implementation=attention), dtype)
    blocks = [(b, found.family) for found in find_blocks(model) for b in found.blocks]
    calls: dict[nn.Module, Any] = {}

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        # A copy, because a cache is filled by the block.
        calls[block] = copy.deepcopy((args, kwargs))

    for block, _ in blocks:
        block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**_in_dtype(case.batch(), dtype))
        for block, family in blocks:
            args, kwargs = copy.deepcopy(calls[block])
            bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            call = {**bound, **bound.pop("kwargs", {})}
            call.pop("kwargs", None)
            hidden = call.pop("hidden_states")
            torch.manual_seed(5)
            halves = family.whole(block, hidden, **call)
            args, kwargs = copy.deepcopy(calls[block])
            torch.manual_seed(5)
            own = block(*args, **kwargs)
            assert torch.equal(halves, own[0] if isinstance(own, tuple) else own)
            assert len(own) == len(family.layout(block).returned(hidden))


@every_head
def test_it_is_still_the_model(case: Case) -> None:
    """Same class, same signature, same fields of the same shapes, the old names with
    the old values in the state; only adapters come on top. What is trainable gets a
    gradient, what is frozen does not."""
    model = case.build()
    kind, signature = type(model), inspect.signature(model.forward)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(**case.batch())
    converted = meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    assert converted is model
    assert type(model) is kind
    assert inspect.signature(model.forward) == signature
    now = model.state_dict()
    assert_same_bits({name: now[name] for name in state}, state)
    assert all(".adapters." in f".{name}" for name in now.keys() - state.keys())

    after = model(**case.batch())
    assert type(after) is type(before)
    assert _shapes(after) == _shapes(before)
    objective(after).backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable >= {n for n, _ in model.named_parameters() if ".adapters." in n}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@every_head
def test_the_names_of_the_family_are_in_the_model(case: Case) -> None:
    """Of the query and value projections in every block, and of the task heads, which
    are trained; language models, poolers and projections have pre-trained weights."""
    with torch.device("meta"):
        model = case.build(1)
    for found in find_blocks(model):
        for block in found.blocks:
            ends = {name.split(".")[-1] for name, _ in block.named_modules()}
            assert set(found.family.query_and_value) <= ends
    is_task = not case.head.endswith(
        ("Model", "LM", "ConditionalGeneration", "ImageModeling", "PreTraining")
    )
    assert bool(new_heads(model)) == is_task


def _shapes(output: Any) -> dict[str, object]:
    """Of every tensor in a model's output; the type of everything else."""
    return {
        name: value.shape if isinstance(value, Tensor) else type(value)
        for name, value in output.items()
    }


@every_head
@pytest.mark.parametrize("trained", ["adapters", "everything"])
def test_gradients_are_the_twins(case: Case, trained: str) -> None:
    """Loss and every gradient have the bits that ordinary autograd gives."""
    model = reversible(case)
    if trained == "everything":
        model.requires_grad_(True)
    rebuilt = gradients(model, case.batch())
    assert_same_bits(rebuilt, gradients(twin_of(model), case.batch()))
    assert all(gradient.isfinite().all() for gradient in rebuilt.values())


@pairs(
    case=slow_but_for(KINDS, *(case for case in KINDS if not case.is_slow)),
    variant=slow_but_for(["meft1", "meft2", "meft3"], "meft1", "meft3"),
    precision=["float32", "bfloat16", "float16", "autocast"],
)
def test_gradients_are_the_twins_in_every_precision(
    case: Case, variant: str, precision: str
) -> None:
    """So they are for each variant with half-precision weights and under autocast, with
    embeddings that train below the stack."""
    autocast = precision == "autocast"
    if autocast and case.family == "DeBERTa":
        pytest.skip("masks with a number that bfloat16 does not have")
    dtype = torch.float32 if autocast else getattr(torch, precision)
    model = reversible(case, dtype=dtype, variant=variant)
    for name, parameter in model.named_parameters():
        if _is_embedding(name):
            parameter.requires_grad_(True)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients(model, _in_dtype(case.batch(), dtype)))
        twin_of(model)
    assert_same_bits(*found)
    assert any(_is_embedding(name) for name in found[0])
    assert all(gradient.isfinite().all() for gradient in found[0].values())


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "shared", "relative"))


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


@every_kind
def test_gradients_are_the_twins_in_chunks(case: Case) -> None:
    """Of tokens, and with every parameter trained."""
    if case.family == "DINOv2":  # refused with it
        case = replace(case, config=partial(case.config, drop_path_rate=0.0))
    model = reversible(case, mlp_chunks=3).requires_grad_(True)
    rebuilt = gradients(model, case.batch())
    assert_same_bits(rebuilt, gradients(twin_of(model), case.batch()))


@every_kind
@variants
def test_the_starting_point_is_preserved(case: Case, variant: str) -> None:
    """With 16 lost bits and silent adapters the model is the plain one, within a few
    quanta a coupling: up to 2 for rounding what is added and what is shifted, and 2^-16
    of the change that the block below made, which is at most twice the greatest value.
    At depth 3 the blocks above pass such errors on about as large as they are. With 4
    lost bits the change weighs 2^12 times as much, far outside."""
    with torch.no_grad():
        expected = case.build().eval()(**case.batch())
        deviation = []
        for lost_bits in (16, 4):
            model = reversible(case, variant=variant, lost_bits=lost_bits).eval()
            _silence(model)
            got = model(**case.batch())
            deviation.append(_first(got).sub(_first(expected)).abs().max().item())
    num_steps = 2 * DEPTH if variant == "meft3" else DEPTH
    change = 2 * _first(expected).abs().max().item()
    a_step = 2 * QUANTUM + 2.0**-16 * change
    assert deviation[0] <= num_steps * a_step < deviation[1]


def _silence(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if ".adapters." in name and ".up." in name:
            nn.init.zeros_(parameter)


def _first(output: Any) -> Tensor:
    """Hidden states of a headless model, logits of a headed one."""
    output = output.get("vision_model_output", output)  # of two towers, one
    first: Tensor = output["logits" if "logits" in output else "last_hidden_state"]
    return first


@every_text_kind
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_does_not_leak(case: Case, padding: str) -> None:
    """Other padded tokens change no bit of the real tokens' outputs nor of a gradient,
    dropout on. On the left for decoders only, as when they generate."""
    if padding == "left" and case.kind in ENCODERS:
        pytest.skip("positions of encoders count from the left")
    rows = case.batch()
    rows.pop("labels", None)
    if padding == "left":
        rows = {name: value.flip(1) for name, value in rows.items()}
    if padding == "left" and case.family not in ("OPT", "BART", "MBart", "BLOOM"):
        rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    masks = {n: m == 0 for n, m in rows.items() if n.endswith("attention_mask")}
    changed = dict(rows)
    for name, padded in masks.items():
        ids = name.replace("attention_mask", "input_ids")
        changed[ids] = rows[ids].masked_fill(padded, VOCAB - 1)
    seen = next(reversed(masks.values()))
    model = reversible(case)
    found = []
    for batch in (rows, changed):
        model.zero_grad()
        torch.manual_seed(3)
        outputs = _first(model(**batch))[~seen]
        (
            outputs * torch.linspace(-1, 1, outputs.numel()).view_as(outputs)
        ).sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(
            {"outputs": outputs.detach()} | {n: g.clone() for n, g in named.items()}
        )
    assert_same_bits(*found)
    assert outputs.isfinite().all()


@every_kind
def test_both_attention_implementations(case: Case) -> None:
    """Eager and SDPA each have their twin's gradients, and in evaluation they agree: a
    last bit that differs can turn the rounding to a quantum and the shift, so by 2
    quanta a coupling. Padding is left out: with a window, it may see no token at all.
    """
    if not getattr(transformers, case.kind)._supports_sdpa:
        pytest.skip("transformers has one only")
    outputs = []
    for attention in ("eager", "sdpa"):
        model = reversible(case)
        model.set_attn_implementation(attention)
        rebuilt = gradients(model, case.batch())
        assert_same_bits(rebuilt, gradients(twin_of(model), case.batch()))
        with torch.no_grad():
            output = _first(model.eval()(**case.batch()))
        masks = [m for n, m in case.batch().items() if n.endswith("attention_mask")]
        seen = [m == 1 for m in masks if m.shape == output.shape[:2]]
        outputs.append(output[seen[-1]] if seen else output)
    allowed = 2 * 2 * DEPTH * QUANTUM
    torch.testing.assert_close(*outputs, rtol=0, atol=allowed)


@every_kind
@pytest.mark.parametrize("span", [(1, 3), (0, 2), (1, 2)])
def test_a_span_equals_its_twin(case: Case, span: tuple[int, int]) -> None:
    """Plain blocks below, rebuilt ones, stored ones above: the same bits again, and no
    adapter below the span."""
    model = reversible(case, span=span)
    model.requires_grad_(True)
    rebuilt = gradients(model, case.batch())
    assert_same_bits(rebuilt, gradients(twin_of(model), case.batch()))
    for stack in find_stacks(model).values():
        first = max(span[0], stack.family.prefix(stack._model_config))
        assert set(stack.adapters) == {str(i) for i in range(first, DEPTH)}


@one_head_each
def test_adapters_are_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    """A plain model that loads them gives the same bits as the one that saved them."""
    saved = reversible(case, variant="meft3")
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    meft.save_adapters(saved, tmp_path)
    loaded = meft.load_adapters(case.build(), tmp_path)
    assert_same_bits(loaded.state_dict(), saved.state_dict())
    assert_same_bits(gradients(loaded, case.batch()), gradients(saved, case.batch()))


@one_head_each
@variants
def test_the_check_finds_no_error(case: Case, variant: str) -> None:
    """Every block is reported under its name in the model, encoder before decoder, and
    every error is 0."""
    blocks = tuple(
        f"{found.name}.{index}"
        for found in find_blocks(case.build())
        for index in range(len(found.blocks))
    )
    case_model = reversible(case, variant=variant)
    report = check_reversible(case_model, case.batch())
    assert report.blocks == blocks
    assert len(blocks) == len(find_stacks(case_model)) * DEPTH
    assert not any(report.reconstruction_error)
    assert not any(report.point_error)
    assert not any(report.gradient_error)


@cases("BertModel", "OPTModel", "BartModel", "LlamaModel", "ViTModel")
@pytest.mark.parametrize(
    ("variant", "depth"), [("meft1", 2), ("meft1", 8), ("meft2", 2), ("meft3", 2)]
)
def test_what_a_stack_keeps(case: Case, variant: str, depth: int) -> None:
    """To the byte: two streams of int32; the lost bits of every scaled coupling, but
    not where both streams are still equal; and 8 bytes a coupling for its sum."""
    model = reversible(case, depth, variant=variant, lost_bits=3)
    calls: list[tuple[ReversibleBlocks, Any, Any]] = []

    def note(stack: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((stack, args, kwargs))  # type: ignore[arg-type]

    stacks = find_stacks(model)
    for stack in stacks.values():
        stack.register_forward_pre_hook(note, with_kwargs=True)
    model(**case.batch())
    assert len(calls) == len(stacks)
    num_kept = {"meft1": depth - 1, "meft2": depth, "meft3": 2 * depth - 1}[variant]
    # The last block of MEFT1 has no second step.
    num_steps = 2 * depth - (variant == "meft1")
    for stack, args, kwargs in list(calls):
        (hidden,), every = args, kwargs["arguments_of_blocks"]
        # Not the cache that was left empty.
        every = [a._replace(kwargs={**a.kwargs, FIELD: None}) for a in every]
        given = [hidden, *every[0].args, *every[0].kwargs.values()]
        given = [t for t in given if isinstance(t, Tensor)]
        with saved_bytes([*model.parameters(), *given]) as counter:
            out = stack(hidden, arguments_of_blocks=every)
        kept = num_kept * packed_bytes(out.numel(), 3)
        assert counter.total == 2 * 4 * out.numel() + kept + 8 * num_steps
