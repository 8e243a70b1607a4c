"""Training with sparse adapters as people train."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, Trainer, TrainingArguments

import meft
from library.sparse import (
    HIDDEN,
    Texts,
    all_rows,
    batches,
    config,
    plain_model,
    randomise,
    row_gradients,
    sparse_model,
    train,
)
from meft.errors import AdapterFileError, ConfigError, UnsupportedCallError
from meft.sparse.adapter import sparse_adapters


def backward(model: PreTrainedModel, count: int = 1) -> None:
    for inputs in batches(count):
        model(**inputs).loss.backward()


def test_at_the_start_the_model_computes_what_it_did() -> None:
    plain, model = plain_model().eval(), plain_model().eval()
    meft.add_sparse_adapters(model, config())
    (inputs,) = batches(1)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {name.split("parallel_adapter.")[1] for name in names} == {
        "router",
        "neurons",
    }


def test_a_global_norm_has_the_rows_in_it() -> None:
    model = sparse_model()
    backward(model, 3)
    others = [
        p.grad.square().sum()
        for n, p in model.named_parameters()
        if p.grad is not None and not n.endswith("neurons")
    ]
    wanted = torch.stack([*others, row_gradients(model).square().sum()]).sum().sqrt()
    found = clip_grad_norm_(model.parameters(), torch.inf)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device_bytes", [2**30, 9000])
def test_clipping_scales_the_rows_step(device_bytes: int) -> None:
    """SGD-like: with a fresh Adam whose eps dwarfs all, a step is lr / eps times g."""
    moved = []
    for clip in (None, 0.25):
        model = sparse_model(device_bytes=device_bytes)
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e3, eps=1e6)
        before = all_rows(model).clone()
        backward(model, 2)
        norm = clip_grad_norm_(model.parameters(), clip or torch.inf)
        optimizer.step()
        moved.append(all_rows(model) - before)
    torch.testing.assert_close(moved[1], moved[0] * (0.25 / norm), rtol=1e-2, atol=1e-6)


DROPS: dict[str, Callable[[PreTrainedModel, torch.optim.Optimizer], None]] = {
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("how", DROPS)
@pytest.mark.parametrize("device_bytes", [2**30, 9000])
def test_zeroing_gradients_zeroes_the_rows(how: str, device_bytes: int) -> None:
    model = sparse_model(device_bytes=device_bytes)
    optimizer = meft.SparseAdamW(model.parameters())
    backward(model)
    wanted = row_gradients(model).clone()
    DROPS[how](model, optimizer)
    backward(model)
    assert torch.equal(row_gradients(model), wanted)


def test_gradients_add_up_over_a_window() -> None:
    """Also where they were scaled on the way."""
    model = sparse_model(num_experts=0)
    backward(model)
    one = row_gradients(model).clone()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(3)
    backward(model)
    torch.testing.assert_close(row_gradients(model), 4 * one, rtol=1e-4, atol=1e-5)


def test_two_forwards_before_a_backward_count_both() -> None:
    one, both = sparse_model(), sparse_model()
    first, second = batches(2)
    one(**first).loss.backward()
    one(**second).loss.backward()
    (both(**first).loss + both(**second).loss).backward()
    torch.testing.assert_close(row_gradients(both), row_gradients(one))


def test_a_loss_scaler_unscales_rows_and_skips_an_overflow() -> None:
    plain, scaled = sparse_model(), sparse_model()
    for model in (plain, scaled):
        optimizer = meft.SparseAdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=model is scaled)
        for step, inputs in enumerate(batches(4)):
            loss = model(**inputs).loss
            scaler.scale(loss).backward()
            if model is scaled and step == 1:
                overflowed = sparse_adapters(model)["model.layers.1.parallel_adapter"]
                assert overflowed.neurons.grad is not None
                overflowed.neurons.grad.mul_(torch.inf)
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            if model is scaled or step != 1:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    torch.testing.assert_close(all_rows(plain), all_rows(scaled), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("update", ["dense", "lazy", "catchup"])
def test_a_training_run_can_be_taken_up_again(update: str, tmp_path: Path) -> None:
    """From the optimizer's state dict, to the same bits."""
    whole, first, second = (sparse_model(update=update) for _ in range(3))
    data = list(batches(6))

    def steps(model: Any, optimizer: Any, some: list[dict[str, Tensor]]) -> None:
        for inputs in some:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    made = [meft.SparseAdamW(m.parameters(), lr=1e-2) for m in (whole, first, second)]
    steps(whole, made[0], data)
    steps(first, made[1], data[:3])
    torch.save(made[1].state_dict(), tmp_path / "optimizer.pt")
    second.load_state_dict(first.state_dict())
    made[2].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(second, made[2], data[3:])
    assert torch.equal(all_rows(second), all_rows(whole))


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = sparse_model()
    optimizer = meft.SparseAdamW(model.parameters())
    before = all_rows(model).clone()
    other = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ConfigError, match="not saved by a `SparseAdamW`"):
        optimizer.load_state_dict(other)
    smaller = sparse_model(num_neurons=32, num_experts=16)
    state = meft.SparseAdamW(smaller.parameters()).state_dict()
    with pytest.raises(ConfigError, match="32 rows"):
        optimizer.load_state_dict(state)
    assert torch.equal(all_rows(model), before)


def test_a_copy_of_a_model_has_rows_of_its_own() -> None:
    model = sparse_model()
    twin = copy.deepcopy(model)
    wanted = train(model)
    rows = all_rows(model).clone()
    assert train(twin) == wanted
    assert torch.equal(all_rows(twin), rows)
    assert torch.equal(all_rows(model), rows)


def test_gradient_checkpointing_changes_nothing() -> None:
    """The recompute gets the padding of its forward."""
    plain, rebuilt = sparse_model(), sparse_model()
    rebuilt.activation_checkpointing_enable({"use_reentrant": False})
    assert train(rebuilt) == train(plain)
    assert torch.equal(all_rows(rebuilt), all_rows(plain))


def test_hidden_states_and_attentions_are_still_to_be_had() -> None:
    model = sparse_model().eval()
    model.set_attn_implementation("eager")
    (inputs,) = batches(1)
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert len(out.attentions) == 3


def test_generation_with_a_cache_is_that_without() -> None:
    model = sparse_model().eval()
    (inputs,) = batches(1)
    text = {n: inputs[n] for n in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**text, **options, use_cache=True)
    without = model.generate(**text, **options, use_cache=False)
    assert torch.equal(with_cache, without)


def trainer(model: PreTrainedModel, directory: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(),
        optimizer_cls_and_kwargs=(meft.SparseAdamW, {"lr": 1e-2}),
    )


def test_trainer_trains_saves_and_takes_up_again(tmp_path: Path) -> None:
    """With accumulation and clipping; the rows of the second half are the same bits."""
    model = sparse_model()
    start = all_rows(model).clone()
    trainer(model, tmp_path / "whole").train()
    assert not torch.equal(all_rows(model), start)

    again = sparse_model()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(all_rows(again), all_rows(model))

    loaded = plain_model()
    meft.load_adapters(loaded, tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(all_rows(loaded), all_rows(model))


@pytest.mark.parametrize("placement", ["offloaded", "resident"])
def test_saved_adapters_give_the_same_outputs(placement: str, tmp_path: Path) -> None:
    """Into the plain model, and into one whose rows live elsewhere."""
    model = sparse_model()
    train(model)
    meft.save_adapters(model.eval(), tmp_path)
    (inputs,) = batches(1)
    wanted = model(**inputs).logits
    loaded = meft.load_adapters(plain_model().eval(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, wanted)
    other = meft.add_sparse_adapters(plain_model().eval(), config(placement=placement))
    meft.load_adapters(other, tmp_path)
    assert torch.equal(other(**inputs).logits, wanted)


def test_adapters_of_another_config_are_refused(tmp_path: Path) -> None:
    meft.save_adapters(sparse_model(), tmp_path)
    model = sparse_model(top_k_neurons=5)
    with pytest.raises(AdapterFileError, match="top_k_neurons=6"):
        meft.load_adapters(model, tmp_path)
    other = plain_model(hidden_size=2 * HIDDEN)
    with pytest.raises(AdapterFileError, match="hidden_size"):
        meft.load_adapters(other, tmp_path)
    assert not sparse_adapters(other)


def test_adapters_are_added_once() -> None:
    model = sparse_model()
    with pytest.raises(meft.UnsupportedModelError, match="already"):
        meft.add_sparse_adapters(model, config())


REVERSIBLE: dict[str, dict[str, Any]] = {
    "meft1": {"variant": "meft1"},
    "meft2": {"variant": "meft2"},
    "meft3": {"variant": "meft3"},
    "float": {"variant": "meft1", "arithmetic": "float", "backward": "store"},
    "span": {"variant": "meft1", "span": (1, 2)},
}


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_reversible_model_with_sparse_adapters_has_its_twins_gradients(
    name: str,
) -> None:
    """In every bit: loss, parameters and rows."""
    found = []
    for backward_pass in ("rebuild", "store"):
        model = sparse_model()
        fields = {**REVERSIBLE[name], "backward": backward_pass}
        if name == "float":
            fields["backward"] = "store"
        torch.manual_seed(2)
        meft.make_reversible(model, meft.ReversibleConfig(bottleneck_size=3, **fields))
        randomise(model)
        (inputs,) = batches(1)
        loss = model(**inputs).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss, grads, row_gradients(model)))
    (loss, grads, rows), (other_loss, other_grads, other_rows) = found
    assert torch.equal(loss, other_loss)
    assert rows.any()
    assert torch.equal(rows, other_rows)
    assert grads.keys() == other_grads.keys()
    for key, grad in grads.items():
        assert grad is not None
        assert torch.equal(grad, other_grads[key])


def test_both_methods_train_save_and_load_together(tmp_path: Path) -> None:
    model = sparse_model()
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    train(model)
    meft.save_adapters(model.eval(), tmp_path)
    (inputs,) = batches(1)
    loaded = meft.load_adapters(plain_model().eval(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("field", ["mlp_chunks", "on_mismatch"])
def test_what_cannot_go_together_is_refused(field: str) -> None:
    value: Any = {"mlp_chunks": 2, "on_mismatch": "skip"}[field]
    options: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=field):
        meft.make_reversible(
            sparse_model(), meft.ReversibleConfig(variant="meft1", **options)
        )
    model = plain_model()
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    with pytest.raises(meft.UnsupportedModelError, match="add_sparse_adapters"):
        meft.add_sparse_adapters(model, config())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedCallError, match="one process"):
        backward(model)
