"""Sparse adapters where other things happen between their forwards and steps."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from library.sparse import (
    all_rows,
    batches,
    config,
    plain_model,
    randomise,
    sparse_model,
    train,
)
from marks import slow_but_for
from meft.errors import HostMemoryError, UnsupportedCallError, UnsupportedModelError
from meft.sparse.adapter import sparse_adapters


class Stop(Exception):
    """Raised inside of a block."""


def after_failures(where: str, blocks: tuple[int, ...], **fields: Any) -> list[float]:
    """Losses of evaluations, each after forwards that end in the middle of a block."""
    model = sparse_model(4, device_bytes=2**14, **fields)

    def stop(*arguments: Any) -> None:
        raise Stop

    losses = []
    for inputs in batches(4):
        for index in blocks:
            part = model.model.layers[index].get_submodule(where)
            with part.register_forward_pre_hook(stop), torch.no_grad():
                with pytest.raises(Stop):
                    model(**inputs)
        with torch.no_grad():
            losses.append(model(**inputs).loss.item())
    return losses


@pytest.mark.parametrize("cache", ["steps", "window", "home"])
@pytest.mark.parametrize("blocks", [(2, 2), (2, 2, 1), (1,)])
def test_a_prefetch_never_lands_in_the_slots_of_others(
    cache: str, blocks: tuple[int, ...]
) -> None:
    """Blocks that fail age rows that are on their way."""
    wanted = after_failures("mlp", blocks, placement="resident")
    assert after_failures("mlp", blocks, cache=cache) == wanted


@pytest.mark.parametrize("window", slow_but_for([1, 4], 1))
def test_a_step_while_rows_are_on_their_way(window: int) -> None:
    """Blocks run alone before a step, which clears the cache."""

    def run(**fields: Any) -> list[Tensor]:
        model = sparse_model(4, device_bytes=2**14, **fields)
        adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
        logits = []
        for index, inputs in enumerate(batches(4 * window)):
            out = model(**inputs)
            logits.append(out.logits.detach())
            out.loss.backward()
            if index % window == window - 1:
                hidden = model.model.embed_tokens(inputs["input_ids"])
                places = torch.arange(hidden.shape[1])[None]
                turns = model.model.rotary_emb(hidden, places)
                for block in model.model.layers[:2]:
                    with torch.no_grad():
                        hidden = block(hidden, position_embeddings=turns)
                adam.step()
                adam.zero_grad()
        return [*logits, all_rows(model)]

    for one, other in zip(run(placement="resident"), run(cache="window"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("semantics", ["token_topk", "union"])
def test_every_neuron_is_scored_alike_wherever_rows_are(semantics: str) -> None:
    """Without experts, tokens are rounded as they are sent to the host."""
    fields: dict[str, Any] = {"num_experts": 0, "transfer_dtype": "bfloat16"}
    fields["semantics"] = semantics
    here = sparse_model(**fields, placement="resident")
    away = sparse_model(**fields)
    assert train(here) == train(away)
    assert torch.equal(all_rows(here), all_rows(away))


def test_threads_have_paddings_of_their_own() -> None:
    model = sparse_model().eval()
    first, second = (
        {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for inputs in batches(2)
    )
    second["attention_mask"] = second["attention_mask"].flip(0)
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in (first, second)]
    inside, found = threading.Barrier(2, timeout=60), {}

    def meet(*arguments: Any) -> None:
        if arguments[0] is model.model.layers[1].mlp:
            inside.wait()

    def work(index: int, inputs: dict[str, Tensor]) -> None:
        with torch.no_grad():
            found[index] = model(**inputs).logits

    # A lock keeps the rows from both; paddings are what is looked at.
    with model.model.layers[1].mlp.register_forward_pre_hook(meet):
        threads = [
            threading.Thread(target=work, args=(index, inputs))
            for index, inputs in enumerate((first, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, inputs in enumerate((first, second)):
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[index][kept], wanted[index][kept])


def test_hooks_of_a_step_run_once() -> None:
    """Also after another optimizer of torch's class was made."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model = sparse_model()
    adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
    seen: list[Tensor] = []
    adam.register_step_post_hook(lambda *a: seen.append(all_rows(model).clone()))
    (inputs,) = batches(1)
    model(**inputs).loss.backward()
    adam.step()
    assert len(seen) == 1
    assert torch.equal(seen[0], all_rows(model))


@pytest.mark.parametrize("placement", ["resident", "offloaded"])
def test_hooks_on_an_adapter_see_and_change_its_input(placement: str) -> None:
    model = sparse_model(placement=placement)
    (inputs,) = batches(1)
    plain = model(**inputs).loss
    counts = {"full": 0}

    def count(*arguments: Any) -> None:
        counts["full"] += 1

    *_, adapter = sparse_adapters(model).values()
    with adapter.register_full_backward_hook(count):
        model(**inputs).loss.backward()
    assert counts["full"] == 1
    with adapter.register_forward_pre_hook(lambda module, args: (0 * args[0],)):
        assert not torch.equal(model(**inputs).loss, plain)
    assert torch.equal(model(**inputs).loss, plain)


def test_a_step_without_room_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(fails: bool) -> list[Tensor]:
        model = sparse_model(folder=tmp_path)
        adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
        (inputs,) = batches(1)
        model(**inputs).loss.backward()
        if fails:

            def full(*arguments: int) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(os, "posix_fallocate", full)
                with pytest.raises(HostMemoryError, match="the disk is full"):
                    adam.step()
        adam.step()
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    for one, other in zip(after_step(False), after_step(True), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_there_after_a_step_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sparse_model()
    adam = meft.SparseAdamW(model.parameters(), lr=1e-2)
    (inputs,) = batches(1)
    model(**inputs).loss.backward()

    def fail(*arguments: Any, **named: Any) -> None:
        raise Stop

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(Stop):
        adam.step()
    for adapter in sparse_adapters(model).values():
        assert adapter.neurons.grad is not None


@pytest.mark.parametrize("placement", ["resident", "offloaded"])
def test_an_evaluation_in_inference_mode_comes_first(placement: str) -> None:
    plain, model = (sparse_model(placement=placement) for _ in range(2))
    (inputs,) = batches(1)
    adam = meft.SparseAdamW(model.parameters())
    with torch.inference_mode():
        model(**inputs)
        adam.state_dict()
    assert train(model) == train(plain)
    assert torch.equal(all_rows(model), all_rows(plain))


def test_rows_are_no_wider_than_float32() -> None:
    model = plain_model().double()
    meft.add_sparse_adapters(model, config())
    randomise(model)
    store = next(iter(sparse_adapters(model).values())).rows.store
    assert store.transfer_dtype == torch.float32
    train(model)


def test_weights_have_to_be_there() -> None:
    with torch.device("meta"):
        model = plain_model()
    with pytest.raises(UnsupportedModelError, match="no weights yet"):
        meft.add_sparse_adapters(model, config())


def test_a_copy_is_evaluated_beside_other_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It trains nothing, so that nothing has to be averaged."""
    model = sparse_model()
    (inputs,) = batches(1)
    monkeypatch.setattr("meft.sparse.row_parameter._is_distributed", lambda: True)
    with torch.no_grad():
        model.eval()(**inputs)
        with pytest.raises(UnsupportedCallError, match="average_row_gradients"):
            model.train()(**inputs)
    with pytest.raises(UnsupportedCallError, match="average_row_gradients"):
        model.eval()(**inputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_change_rows_in_files(tmp_path: Path) -> None:
    """It would change those of its parent. It may read them."""
    model = sparse_model(folder=tmp_path)
    before = all_rows(model).clone()
    store = next(iter(sparse_adapters(model).values())).rows.store
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.read(torch.arange(3))
            try:
                store.replace(torch.zeros_like(before[: len(store)]))
            except UnsupportedCallError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(all_rows(model), before)


def test_a_folder_is_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may go elsewhere before it has made all of its files."""
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    model = sparse_model(folder="rows")
    monkeypatch.chdir("/")
    train(model)
