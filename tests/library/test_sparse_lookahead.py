"""Experts that are chosen at an earlier block (`SparseConfig.lookahead`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import meft
from library.sparse import (
    DEPTH,
    HIDDEN,
    VOCAB,
    all_rows,
    batches,
    config,
    engine_of,
    plain_model,
    randomise,
    sparse_model,
    train,
)
from meft.errors import AdapterFileError, ConfigError, UnsupportedCallError
from meft.sparse import router
from meft.sparse.adapter import NO_BATCH, SparseAdapter, sparse_adapters

FAR = [1, 2]


def without_padding() -> dict[str, Tensor]:
    (inputs,) = batches(1)
    return {"input_ids": inputs["input_ids"]}


@pytest.mark.parametrize("far", FAR)
def test_experts_are_those_of_the_input_of_an_earlier_block(
    far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first blocks choose by their own, and gates are of their own everywhere."""
    model = sparse_model(lookahead=far).eval()
    adapters = list(sparse_adapters(model).values())
    found: dict[SparseAdapter, tuple[Tensor | None, Tensor | None]] = {}
    inputs: dict[SparseAdapter, Tensor] = {}
    choose = SparseAdapter._experts_of

    def noted(self: SparseAdapter, tokens: Tensor, early: Any) -> Any:
        inputs[self] = tokens
        found[self] = choose(self, tokens, early)
        return found[self]

    monkeypatch.setattr(SparseAdapter, "_experts_of", noted)
    model(**without_padding())
    for index, adapter in enumerate(adapters):
        assert adapter.router is not None
        earlier = adapters[index - far] if index >= far else adapter
        experts, gates = found[adapter]
        assert experts is not None
        assert gates is not None
        wanted = router.top(inputs[earlier] @ adapter.router.T, 4)
        assert torch.equal(experts, wanted)
        own = (inputs[adapter] @ adapter.router.T).gather(1, wanted)
        assert torch.equal(gates, own)


def test_it_is_another_function() -> None:
    inputs = without_padding()
    logits = [sparse_model(lookahead=far)(**inputs).logits for far in (0, *FAR)]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


def test_rows_are_sent_before_the_block_that_uses_them_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each block but the first finds all of its rows on the device, though stale."""
    model = sparse_model(lookahead=1)
    engine = engine_of(model)
    adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
    first, second = batches(2)
    model(**first).loss.backward()
    adam.step()
    engine.reset_counters()
    taken = []
    for block in engine.blocks[1:]:
        take = block.take

        def noted(ids: Tensor, take: Any = take) -> Tensor:
            hits = engine.num_hits
            rows: Tensor = take(ids)
            taken.append((engine.num_hits - hits, len(ids)))
            return rows

        monkeypatch.setattr(block, "take", noted)
    model(**second)
    assert len(taken) == DEPTH - 1
    assert all(hits == wanted > 0 for hits, wanted in taken)


@pytest.mark.parametrize("far", FAR)
def test_checkpointing_keeps_what_the_forward_chose(far: int) -> None:
    """Also if the forwards of two batches are before both backwards."""
    plain, rebuilt = sparse_model(lookahead=far), sparse_model(lookahead=far)
    rebuilt.activation_checkpointing_enable({"use_reentrant": False})
    assert train(rebuilt) == train(plain)
    for model in (plain, rebuilt):
        adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
        losses = [model(**inputs).loss for inputs in batches(2)]
        sum(losses, torch.zeros(())).backward()
        adam.step()
    assert torch.equal(all_rows(rebuilt), all_rows(plain))


@pytest.mark.parametrize("far", FAR)
def test_a_reversible_model_has_its_twins_gradients(far: int) -> None:
    found = []
    for backward in ("rebuild", "store"):
        model = sparse_model(lookahead=far)
        torch.manual_seed(2)
        fields: dict[str, Any] = {"variant": "meft1", "backward": backward}
        meft.make_reversible(model, meft.ReversibleConfig(bottleneck_size=3, **fields))
        found.append((train(model), all_rows(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_generation_with_a_cache_is_that_without() -> None:
    model = sparse_model(lookahead=1).eval()
    (inputs,) = batches(1)
    text = {n: inputs[n] for n in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**text, **options, use_cache=True)
    without = model.generate(**text, **options, use_cache=False)
    assert torch.equal(with_cache, without)


def test_a_block_alone_is_refused() -> None:
    model = sparse_model(lookahead=1)
    block = model.model.layers[1]
    with pytest.raises(UnsupportedCallError, match="run the whole model"):
        block.parallel_adapter(torch.randn(1, 4, 16))


def test_what_cannot_look_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="no router"):
        meft.SparseConfig(num_experts=0, lookahead=1)
    with pytest.raises(ConfigError, match=f"set it to at most {DEPTH - 1}"):
        meft.add_sparse_adapters(plain_model(), config(lookahead=DEPTH))
    with pytest.raises(ConfigError, match="lookahead"):
        meft.SparseConfig(lookahead=-1)


def test_files_say_it_and_older_ones_are_without(tmp_path: Path) -> None:
    meft.save_adapters(sparse_model(lookahead=1).eval(), tmp_path)
    loaded = meft.load_adapters(plain_model(), tmp_path)
    far = {a.config.lookahead for a in sparse_adapters(loaded).values()}
    assert far == {1}
    with pytest.raises(AdapterFileError, match="lookahead"):
        sparse_model().load_state_dict(sparse_model(lookahead=1).state_dict())
    old = config().to_json()
    del old["lookahead"]
    assert meft.SparseConfig.from_json(old) == config()
    assert "lookahead" not in config().function()


def opt(**fields: Any) -> OPTForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 32}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 2, "dropout": 0.0}
    model = OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=HIDDEN))
    meft.add_sparse_adapters(model, config(**fields))
    randomise(model)
    return model


@pytest.mark.parametrize("far", [0, 1])
def test_a_head_that_calls_the_decoder_tells_of_the_batch(far: int) -> None:
    """Padding chooses nothing there, as where the model without a head is called."""
    model = opt(lookahead=far, semantics="union")
    (inputs,) = batches(1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    others = torch.where(mask == 0, 7, ids)
    assert torch.equal(
        model(input_ids=others, attention_mask=mask).logits[mask == 1],
        logits[mask == 1],
    )
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)
    for adapter in sparse_adapters(model).values():
        assert adapter.shared.batch is NO_BATCH


def test_a_forward_inside_of_another_one_leaves_its_batch() -> None:
    """As one in a hook of the user; padding and early choices are of each its own."""
    first, second = batches(2)
    inner = {"input_ids": second["input_ids"][:1, :5]}
    model = sparse_model(lookahead=1, semantics="union").eval()
    with torch.no_grad():
        wanted = model(**first).logits, model(**inner).logits
        found: list[Tensor | None] = []

        def nested(*unused: Any) -> None:
            if not found:
                found.append(None)
                found.append(model(**inner).logits)

        with model.model.layers[1].mlp.register_forward_hook(nested):
            outer = model(**first).logits
    assert torch.equal(outer, wanted[0])
    assert found[1] is not None
    assert torch.equal(found[1], wanted[1])


def test_removing_adapters_leaves_no_hooks() -> None:
    model = opt(lookahead=1)
    meft.remove_adapters(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
