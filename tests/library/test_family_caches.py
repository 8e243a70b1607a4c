"""Keys and values that are kept for the next call, by every family of decoders."""

import copy
from typing import Any

import pytest
import torch

import meft
from library.families import (
    DEPTH,
    ROWS,
    SEQ,
    VOCAB,
    Batch,
    Case,
    cases,
    objective,
    reversible,
    text,
)
from meft.backbone.caches import FIELD
from meft.reversible.integer_format import FRACTION_BITS_WIDE

every_decoder = cases("ForCausalLM", "ForConditionalGeneration")
QUANTUM = 2.0**-FRACTION_BITS_WIDE


@every_decoder
@pytest.mark.parametrize("variant", ["meft1", "meft3"])
def test_generation_with_a_cache(case: Case, variant: str) -> None:
    """Greedy tokens are the same with and without a cache of keys and values, and for a
    padded row as for that row alone; logits differ by what 2 quanta a coupling can do,
    and each token enters the cache once."""
    model = reversible(case, variant=variant).eval()
    rows = inputs_of(case)
    if case.kind.endswith("BartForCausalLM"):
        # Its positions count padding: only rows without any are the same alone.
        rows = {name: value[1:] for name, value in rows.items()}
    elif not model.config.is_encoder_decoder:
        rows = _padded_left(rows)
    alone = {name: value[:1] for name, value in rows.items()}
    if "attention_mask" in rows:
        real = rows["attention_mask"][0] == 1
        alone = {name: value[:, real] for name, value in alone.items()}
    with_cache = _generate(model, rows, use_cache=True)
    without = _generate(model, rows, use_cache=False)
    unpadded = _generate(model, alone, use_cache=True)
    num_kept = with_cache[FIELD].get_seq_length()
    assert num_kept == with_cache.sequences.shape[1] - 1
    assert without.get(FIELD) is None
    assert torch.equal(with_cache.sequences, without.sequences)
    new = len(with_cache.logits)
    assert torch.equal(with_cache.sequences[:1, -new:], unpadded.sequences[:, -new:])

    outputs = [torch.stack(o.logits) for o in (with_cache, without, unpadded)]
    gain = model.get_output_embeddings().weight.abs().sum(1).max().item()
    allowed = 2 * 2 * DEPTH * QUANTUM * gain
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=allowed)
    torch.testing.assert_close(outputs[0][:, :1], outputs[2], rtol=0, atol=allowed)


def inputs_of(case: Case) -> Batch:
    """What a model reads to generate: texts; sounds for Whisper."""
    if case.family == "Whisper":
        return {"input_features": case.batch()["input_features"]}
    return text()


def _padded_left(rows: Batch) -> Batch:
    """As decoders are padded to generate: what stands on the right goes first."""
    width = int((rows["attention_mask"][0] == 0).sum())
    return {n: torch.cat([x[:1].roll(width, 1), x[1:]]) for n, x in rows.items()}


def _generate(model: Any, rows: Batch, use_cache: bool) -> Any:
    return model.generate(
        **rows,
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=4,
        min_new_tokens=4,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("backward", ["rebuild", "store"])
@cases("ForCausalLM", "ForConditionalGeneration")
def test_a_text_in_segments(case: Case, backward: str) -> None:
    """A cache that training has left empty is refused when it is given again, also in
    evaluation and as a copy: the model would not see the first segment. With `eval()`
    it is filled, and the second segment has the logits of the whole text."""
    tokens = text()["input_ids"][:, :6]
    rows: Batch = {}
    name = "decoder_input_ids" if "ConditionalGeneration" in case.kind else "input_ids"
    if name == "decoder_input_ids":
        rows = inputs_of(case)
    if "attention_mask" in rows:
        rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    one, two = {**rows, name: tokens[:, :4]}, {**rows, name: tokens[:, 4:]}
    model = reversible(case, backward=backward)
    for cache in (
        model(**one, use_cache=True)[FIELD],
        copy.deepcopy(model(**one, use_cache=True)[FIELD]),
    ):
        for train in (True, False):
            model.train(train)
            with pytest.raises(meft.UnsupportedCallError, match="left it empty"):
                model(**two, **{FIELD: cache})
        model.train()
    model.eval()
    cache = model(**one, use_cache=True)[FIELD]
    logits = model(**two, **{FIELD: cache}).logits
    whole = model(**rows, **{name: tokens}, use_cache=False).logits[:, 4:]
    assert (logits - whole).abs().max() < 1e-4
    logits.sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole.sum().backward()
    for n, gradient in found.items():
        expected = model.get_parameter(n).grad
        assert expected is not None
        assert (gradient - expected).norm() <= 1e-2 * expected.norm() + 1e-5, n


@every_decoder
def test_a_cache_in_training(case: Case) -> None:
    """The empty cache that the model makes by itself is dropped; one that holds tokens
    is refused, because the recompute would add them again."""
    model = reversible(case)
    rows: dict[str, Any] = {**inputs_of(case)}
    if case.family in ("Whisper", "T5"):
        rows["decoder_input_ids"] = text()["input_ids"]
    assert model.config.use_cache
    output = model(**rows)
    assert output[FIELD].get_seq_length() == 0
    objective(output).backward()
    with torch.no_grad():
        rows[FIELD] = model.eval()(**rows)[FIELD]
    assert rows[FIELD].get_seq_length() > 0
    one_more = torch.full((ROWS, 1), VOCAB - 1)
    if model.config.is_encoder_decoder:
        rows["decoder_input_ids"] = one_more
    else:
        rows["input_ids"] = one_more
        rows["attention_mask"] = torch.ones(ROWS, SEQ + 1)
    model.eval()(**rows).logits.sum().backward()
    if not model.config.is_encoder_decoder:
        rows["attention_mask"] = torch.ones(ROWS, SEQ + 2)
    with pytest.raises(meft.UnsupportedCallError, match=f"`{FIELD}` that holds"):
        model.train()(**rows)
