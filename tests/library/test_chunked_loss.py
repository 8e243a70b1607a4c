"""A causal model with its loss computed in chunks is the model that it was."""

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import meft
from library.families import Case, assert_same_bits, cases, gradients
from library.losses import (
    HIDDEN,
    VOCAB,
    Seen,
    llama,
    loss_and_gradients,
    relative_error,
    rows,
)


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=64,
        )
    )


def mistral() -> MistralForCausalLM:
    return cast(MistralForCausalLM, llama(MistralForCausalLM))


Build = Callable[[], Any]
families = pytest.mark.parametrize("build", [opt, llama, mistral])


def reversible(model: Any) -> Any:
    torch.manual_seed(1)
    meft.make_reversible(
        model, meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
    )
    return model


REFUSED = {
    *("BART", "MBart"),  # no class of its own for the decoder
    *("Granite", "Gemma 2", "Cohere"),  # scale or cap their logits
    *("Mixtral", "Qwen3-MoE"),  # may add to the loss
}


@cases("ForCausalLM")
def test_every_decoder_computes_the_loss_it_computed_before(case: Case) -> None:
    """With one chunk bit by bit; one that changes its logits is refused."""
    model = case.build().eval()
    if case.family in REFUSED:
        with pytest.raises(meft.UnsupportedModelError, match="is not supported"):
            meft.chunk_loss(model)
        return
    expected = gradients(model, case.batch())
    assert_same_bits(gradients(meft.chunk_loss(model), case.batch()), expected)


@families
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11.0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_computes_the_loss_it_computed_before(
    build: Build, num_items: Any, training: bool
) -> None:
    """Bit by bit with one chunk, gradients of all parameters included, tied ones too;
    to rounding with many."""
    model = build().train(training)
    inputs = rows() | {"num_items_in_batch": num_items}
    expected = loss_and_gradients(model, **inputs)
    got = loss_and_gradients(meft.chunk_loss(model), **inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    meft.chunk_loss(meft.unchunk_loss(model), chunk_tokens=4)
    got = loss_and_gradients(model, **inputs)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@families
@pytest.mark.parametrize("chunked_first", [True, False])
def test_it_composes_with_reversible_in_either_order(
    build: Build, chunked_first: bool
) -> None:
    """A reversible model has the same loss and adapters' gradients with its loss
    chunked before or after; its frozen head gets no gradient."""
    expected = loss_and_gradients(reversible(build()).train(), **rows())
    model = build()
    for change in (meft.chunk_loss, reversible)[:: 1 if chunked_first else -1]:
        assert change(model) is model
    got = loss_and_gradients(model.train(), **rows())
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert model.lm_head.weight.grad is None


@families
def test_under_autocast_a_model_computes_the_same(build: Build) -> None:
    """Bfloat16 logits, float32 loss."""
    model = reversible(build()).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, **rows())
        got = loss_and_gradients(meft.chunk_loss(model), **rows())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@families
def test_with_labels_there_are_no_logits_without_nothing_changes(build: Build) -> None:
    """`logits` is None in training and in evaluation; other outputs are as before;
    without labels, and in generation, so is everything."""
    model = build().eval()
    inputs = rows()
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"output_hidden_states": True, "use_cache": True}
    expected, logits = model(**inputs, **options), model(**ids).logits
    generated = model.generate(inputs["input_ids"][1:], max_new_tokens=3)
    meft.chunk_loss(model)
    out = model(**inputs, **options)
    assert out.logits is None
    assert set(out) == set(expected) - {"logits"}
    assert all(map(torch.equal, out.hidden_states, expected.hidden_states))
    assert torch.equal(model(**ids).logits, logits)
    again = model.generate(inputs["input_ids"][1:], max_new_tokens=3)
    assert torch.equal(again, generated)


@families
def test_arguments_mean_what_they_meant(build: Build) -> None:
    """By position, as a tuple, with labels that are shifted already or that ignore
    another class."""
    model = build().eval()
    inputs = rows()
    position = list(inspect.signature(model.forward).parameters).index("labels")
    ids = inputs["input_ids"]
    by_position: list[Tensor | None] = [ids, inputs["attention_mask"]]
    by_position += [None] * (position - 2) + [inputs["labels"]]
    shifted = functional.pad(inputs["labels"], (0, 2), value=-100)[:, 2:].contiguous()
    calls: list[Callable[[], Tensor]] = [
        lambda: model(*by_position).loss,
        lambda: model(**inputs, return_dict=False)[0],
        lambda: model(**inputs, shift_labels=shifted).loss,
        lambda: model(**inputs | {"labels": ids}, ignore_index=int(ids[1, 1])).loss,
    ]
    expected = [call() for call in calls]
    assert len({loss.item() for loss in expected}) == 3
    meft.chunk_loss(model)
    for call, loss in zip(calls, expected, strict=True):
        assert torch.equal(call(), loss)


@families
def test_a_models_step_has_no_tensor_of_all_logits(build: Build) -> None:
    """24 rows of 20 tokens and chunks of 8: the largest tensor is far smaller."""
    model = meft.chunk_loss(reversible(build()), chunk_tokens=8).train()
    inputs = rows(24, 20)
    with Seen() as seen:
        model(**inputs).loss.backward()
    assert seen.largest < 24 * 20 * VOCAB / 8


def test_of_a_float64_model_the_loss_is_float64() -> None:
    """transformers rounds the logits to float32 first."""
    model = llama().double()
    expected = model(**rows()).loss.detach()
    loss = meft.chunk_loss(model)(**rows()).loss.detach()
    assert (expected.dtype, loss.dtype) == (torch.float32, torch.float64)
    assert relative_error(loss, expected) < 1e-6


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows; the further down, the fewer labels."""

    def __init__(self) -> None:
        self.rows = rows(16, 9)
        for index in range(16):
            self.rows["labels"][index, 9 - index // 2 :] = -100

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.rows.items()}


def trainer(model: PreTrainedModel, directory: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        **options,
    )
    return Trainer(
        model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows()
    )


@pytest.mark.parametrize(
    ("build", "bf16"), [(opt, False), (llama, False), (mistral, True)]
)
def test_the_trainer_does_the_same_steps(
    build: Build, bf16: bool, tmp_path: Path
) -> None:
    """Micro-batches with different numbers of labels are accumulated as by the plain
    model: every parameter ends with the same bits, and so does the evaluation."""
    ends = []
    changes: list[Callable[[Any], Any]] = [lambda model: model, meft.chunk_loss]
    for change in changes:
        model = change(reversible(build()))
        run = trainer(model, tmp_path, bf16=bf16)
        run.train()
        ends.append((run.evaluate()["eval_loss"], model.state_dict()))
    (plain_loss, plain), (loss, chunked) = ends
    assert loss == plain_loss
    assert chunked.keys() == plain.keys()
    assert all(torch.equal(chunked[name], plain[name]) for name in plain)


def test_a_trainer_can_predict_without_logits(tmp_path: Path) -> None:
    """Predictions that are requested with the loss are absent, and does not fail."""
    model = meft.chunk_loss(llama())
    out = trainer(model, tmp_path, prediction_loss_only=False).predict(Rows())
    assert out.metrics is not None
    assert "test_loss" in out.metrics
    assert len(out.predictions) == 0


@families
def test_a_copy_uses_its_own_weights(build: Build) -> None:
    """A deep copy is chunked as well, and does not reach into the original."""
    model = meft.chunk_loss(build().eval())
    loss = model(**rows()).loss
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**rows()).loss, loss)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    out = copied(**rows())
    assert out.logits is None
    assert not torch.equal(out.loss, loss)
    assert torch.equal(model(**rows()).loss, loss)


@families
def test_what_is_saved_is_the_model(build: Build, tmp_path: Path) -> None:
    """Class, names and files stay; what is loaded again has its logits."""
    model = build().eval()
    names = list(model.state_dict())
    kind = type(model)
    meft.chunk_loss(model)
    assert type(model) is kind
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [kind.__name__]
    out = loaded(**rows())
    assert out.logits is not None
    assert torch.equal(out.loss, model(**rows()).loss)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    """Of a chunked model, into a chunked one that is not reversible yet."""
    model = meft.chunk_loss(reversible(llama())).eval()
    meft.save_adapters(model, tmp_path)
    loaded = meft.load_adapters(meft.chunk_loss(llama()), tmp_path).eval()
    assert torch.equal(loaded(**rows()).loss, model(**rows()).loss)


def test_undone_it_is_as_before() -> None:
    """The instance has no `forward` of its own any more. Not while somebody else's
    wrapper is around ours, nor twice."""
    model = meft.chunk_loss(llama())
    ours = model.forward
    model.forward = functools.wraps(ours)(lambda *a, **k: ours(*a, **k))
    with pytest.raises(meft.UnsupportedModelError, match="wrapped since"):
        meft.unchunk_loss(model)
    model.forward = ours
    assert meft.unchunk_loss(model) is model
    assert "forward" not in vars(model)
    assert model(**rows()).logits is not None
    with pytest.raises(meft.UnsupportedModelError, match="not chunked"):
        meft.unchunk_loss(model)
