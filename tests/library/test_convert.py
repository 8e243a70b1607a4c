from typing import Any

import pytest
import torch
from transformers import (
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import meft
from library.models import batch, bert_config, classifier, gradient, heads, reversible
from meft.reversible.convert import find_reversible
from meft.reversible.variants import SWAPS
from meft.testing import saved_bytes

variants = pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])


@variants
@pytest.mark.parametrize(("model", "inputs"), heads(), ids=lambda m: type(m).__name__)
def test_every_head_keeps_class_and_outputs(
    variant: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> None:
    """The converted model is of the same class, returns the same fields of the same
    shapes, and every trainable parameter gets a gradient."""
    import copy

    model = copy.deepcopy(model)
    before = model(**inputs)
    kind = type(model)
    after_model = meft.make_reversible(model, meft.ReversibleConfig(variant=variant))
    assert after_model is model
    assert type(model) is kind
    after = model(**inputs)
    assert {k: v.shape for k, v in before.items()} == {
        k: v.shape for k, v in after.items()
    }
    after.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("build", [BertModel, BertForPreTraining])
def test_headless_and_pretraining_classes(build: type[PreTrainedModel]) -> None:
    """Any `Bert*` class converts; without a new head only adapters train."""
    model = build(bert_config())
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".adapters." in f".{name}" for name in trainable)


@variants
def test_adapters_and_the_new_head_train_and_nothing_else(variant: str) -> None:
    """Trainable: 2 (2 d r + d + r) per block and the classifier; the pooler, the norms
    and the embeddings stay frozen."""
    d, r, depth = 16, 3, 4
    model = reversible(depth, hidden=d, variant=variant, bottleneck_size=r)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    adapters = {n: c for n, c in trainable.items() if ".adapters." in n}
    assert sum(adapters.values()) == depth * 2 * (2 * d * r + d + r)
    assert trainable.keys() - adapters.keys() == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_backbones_parameter_names_do_not_change() -> None:
    """What was saved from the plain model still loads, name by name."""
    plain = classifier(2)
    names = set(plain.state_dict())
    converted = meft.make_reversible(plain, meft.ReversibleConfig(variant="meft3"))
    extra = set(converted.state_dict()) - names
    assert names <= set(converted.state_dict())
    assert all(name.startswith("bert.encoder.adapters.") for name in extra)


def test_adapters_start_as_the_backbone_would_initialise_them() -> None:
    """Weights N(0, initializer_range^2), biases 0."""
    model = classifier(2, hidden=256)
    config = meft.ReversibleConfig(variant="meft1", bottleneck_size=128)
    meft.make_reversible(model, config)
    for name, parameter in find_reversible(model).adapters.named_parameters():
        if name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        else:
            assert not parameter.any()


@variants
def test_in_the_limit_the_fresh_stream_is_the_pretrained_model(variant: str) -> None:
    """With silent adapters and the paper's small scale going to 0, the stream that has
    just been through a block carries the frozen model's hidden states."""
    small = {"meft1": (1e-7, 1.0), "meft2": (1.0, 1e-7), "meft3": (1e-7, 1e-7)}
    plain = classifier(3).double().eval()
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = plain.bert.encoder(hidden).last_hidden_state
    scale_1, scale_2 = small[variant]
    model = reversible(
        3, dtype=torch.float64, variant=variant, scale_1=scale_1, scale_2=scale_2
    ).eval()
    encoder = find_reversible(model)
    for name, parameter in encoder.adapters.named_parameters():
        if ".up." in name:
            torch.nn.init.zeros_(parameter)
    from meft.reversible.twin import run

    streams = run(encoder._stack(0, 3, seed=None, mask=None, kwargs={}), hidden, hidden)
    fresh = streams[0] if variant == "meft2" else streams[1]
    torch.testing.assert_close(fresh, expected, rtol=0, atol=1e-5)


@variants
def test_the_merge_is_the_mean_and_the_order_switches(variant: str) -> None:
    """One block by hand: couple, swap for MEFT1 and MEFT2, average."""
    model = reversible(1, dtype=torch.float64, variant=variant).eval()
    encoder = find_reversible(model)
    hidden = torch.randn(2, 3, 16, dtype=torch.float64)
    stack = encoder._stack(0, 1, seed=None, mask=None, kwargs={})
    assert stack.swap == SWAPS[variant] == (variant != "meft3")
    f, g = (branch.function for branch in stack.branches[0])
    y1 = stack.scale_1 * hidden + f(hidden)
    y2 = stack.scale_2 * hidden + g(y1)
    torch.testing.assert_close(encoder(hidden).last_hidden_state, (y1 + y2) / 2)


@variants
def test_padding_does_not_leak(variant: str) -> None:
    """Changing padded tokens changes neither the logits nor a gradient, bit for bit."""
    model = reversible(3, variant=variant)
    inputs = batch()
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][inputs["attention_mask"] == 0] += 1
    results = []
    for rows in (inputs, changed):
        model.zero_grad()
        out = model(**rows)
        out.loss.backward()
        results.append(out.logits)
        results.append(model.classifier.weight.grad)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(attention: str) -> None:
    """Eager and SDPA give the same loss up to rounding."""
    model = reversible(2, variant="meft1")
    model.set_attn_implementation(attention)
    loss = model(**batch()).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(loss, model(**batch()).loss)


@pytest.mark.parametrize("span", [(0, 2), (2, 4), (1, 3)])
def test_the_span_decides_what_is_plain_rebuilt_or_stored(
    span: tuple[int, int],
) -> None:
    """Below the span no adapters and nothing stored; the span stores two streams; above
    it adapters under ordinary autograd. Gradients are the twin's (figure 7)."""
    options: dict[str, Any] = {"scale_1": 1.0, "scale_2": 1.0, "span": span}
    model = reversible(4, dtype=torch.float64, variant="meft1", **options)
    encoder = find_reversible(model)
    assert set(encoder.adapters) == {str(i) for i in range(span[0], 4)}
    hidden = torch.randn(3, 7, 16, dtype=torch.float64)
    with saved_bytes(exclude=model.parameters()) as counter:
        out = encoder(hidden)  # noqa: F841
    streams = 2 * 3 * 7 * 16 * 8
    if span[1] == 4:
        assert counter.total == streams
    else:
        assert counter.total > streams
    model.zero_grad()
    model(**batch()).loss.backward()
    rebuilt = {n: gradient(p) for n, p in encoder.adapters.named_parameters()}
    encoder.backward_pass = "store"
    model.zero_grad()
    model(**batch()).loss.backward()
    for name, parameter in encoder.adapters.named_parameters():
        torch.testing.assert_close(rebuilt[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_the_trainer_trains_it(tmp_path: object) -> None:
    """transformers' `Trainer` runs unchanged: the loss falls, the backbone is as it
    was, evaluation works."""
    model = reversible(2, dropout=0.1, variant="meft1", backward="rebuild")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = batch(rows=8, padded=False)
    dataset = [{k: v[i] for k, v in rows.items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_what_cannot_be_converted_is_named() -> None:
    """Another family, a decoder, a second conversion, checkpointing: refused."""
    config = meft.ReversibleConfig(variant="meft1")
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(meft.UnsupportedModelError, match=r"GPT2LMHeadModel.*Bert\*"):
        meft.make_reversible(gpt, config)
    decoder = bert_config()
    decoder.is_decoder = True
    with pytest.raises(meft.UnsupportedModelError, match="encoder only"):
        meft.make_reversible(BertModel(decoder), config)
    with pytest.raises(meft.UnsupportedModelError, match="already"):
        meft.make_reversible(reversible(1, variant="meft1"), config)
    checkpointed = classifier(1)
    checkpointed.activation_checkpointing_enable()
    with pytest.raises(
        meft.UnsupportedModelError, match="activation_checkpointing_dis"
    ):
        meft.make_reversible(checkpointed, config)


def test_what_a_reversible_model_cannot_do_is_refused() -> None:
    """Hidden states, attentions, and checkpointing switched on later."""
    model = reversible(1, variant="meft1")
    inputs = batch()
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(meft.UnsupportedCallError, match=name):
            model(**inputs, **{name: True})
    model.activation_checkpointing_enable()
    with pytest.raises(meft.UnsupportedCallError, match="checkpointing"):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "metf1"}, r"'metf1'; did you mean 'meft1'"),
        ({"backward": "rebuilt"}, "did you mean 'rebuild'"),
        ({"arithmetic": "int"}, "`arithmetic` must be one of"),
        ({"bottleneck_size": 0}, "at least 1"),
        ({"scale_1": 0.0}, "divides by it"),
        ({"span": (2, 2)}, "first < end"),
    ],
)
def test_illegal_configs_are_refused(options: dict[str, object], message: str) -> None:
    """Each message says what was given and what is valid."""
    with pytest.raises(meft.ConfigError, match=message):
        meft.ReversibleConfig(**{"variant": "meft1", **options})  # type: ignore[arg-type]


def test_a_span_beyond_the_model_is_refused() -> None:
    """The message has both numbers, and the model is left alone."""
    model = classifier(2)
    with pytest.raises(meft.ConfigError, match=r"\(0, 3\).*2 blocks"):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1", span=(0, 3)))
    assert all(p.requires_grad for p in model.parameters())
