import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.bert.modeling_bert import BertPooler

import meft
from library.models import (
    batch,
    bert_config,
    classifier,
    gradients,
    heads,
    only_stack,
    reversible,
)
from meft.reversible.integer_format import FRACTION_BITS_WIDE
from meft.reversible.packing import packed_bytes
from meft.reversible.twin import read
from meft.reversible.variants import fresh_stream
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
    and the embeddings stay frozen. What nothing would read does not exist: with
    `fixed`, MEFT1 has no reversible adapter in its last block."""
    d, r, depth = 16, 3, 4
    model = reversible(depth, hidden=d, variant=variant, bottleneck_size=r)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    adapters = {n: c for n, c in trainable.items() if ".adapters." in n}
    num_adapters = 2 * depth - (variant == "meft1")
    assert sum(adapters.values()) == num_adapters * (2 * d * r + d + r)
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
    assert all(name.startswith("bert.encoder.layer.adapters.") for name in extra)


def test_adapters_start_as_the_backbone_would_initialise_them() -> None:
    """Weights N(0, initializer_range^2), biases 0."""
    model = classifier(2, hidden=256)
    config = meft.ReversibleConfig(variant="meft1", bottleneck_size=128)
    meft.make_reversible(model, config)
    for name, parameter in only_stack(model).adapters.named_parameters():
        if name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
        else:
            assert not parameter.any()


@variants
@pytest.mark.parametrize("coupling", ["paper", "difference"])
def test_in_the_limit_the_fresh_stream_is_the_pretrained_model(
    variant: str, coupling: str
) -> None:
    """With silent adapters and the small scale going to 0, the stream that has just
    been through a block carries the frozen model's hidden states."""
    small = {"meft1": (1e-7, 1.0), "meft2": (1.0, 1e-7), "meft3": (1e-7, 1e-7)}
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = through_plain_blocks(3, hidden)
    scale_1, scale_2 = small[variant]
    model = silent(
        reversible(
            3,
            dtype=torch.float64,
            variant=variant,
            arithmetic="float",
            coupling=coupling,
            scale_1=scale_1,
            scale_2=scale_2,
        )
    )
    stack, streams, couplings, _ = only_stack(model).streams(hidden)
    fresh = read(stack, streams.pair()[fresh_stream(couplings)])
    torch.testing.assert_close(fresh, expected, rtol=0, atol=1e-5)


@variants
def test_lost_bits_buy_the_starting_point(variant: str) -> None:
    """With silent adapters the output deviates from the pre-trained model's by the
    small scale or less: two bits more, at least three times nearer; at 16 bits a few
    quanta are left."""
    hidden = torch.randn(2, 5, 16)
    expected = through_plain_blocks(6, hidden.double()).float()
    errors = {}
    for lost_bits in (0, 2, 4, 16):
        model = silent(reversible(6, variant=variant, lost_bits=lost_bits))
        got = only_stack(model)(hidden)
        errors[lost_bits] = ((got - expected).norm() / expected.norm()).item()
    assert errors[0] > 3 * errors[2] > 9 * errors[4] > 27 * errors[16]
    assert errors[16] < 6 * 64 * 2.0**-FRACTION_BITS_WIDE


def through_plain_blocks(depth: int, hidden: torch.Tensor) -> torch.Tensor:
    """The last hidden state of the model that `reversible` converts."""
    plain = classifier(depth).eval()
    torch.nn.Module.to(plain, hidden.dtype)
    out: torch.Tensor = plain.bert.encoder(hidden).last_hidden_state
    return out


def silent(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation, with adapters that give 0."""
    for name, parameter in only_stack(model).adapters.named_parameters():
        if ".up." in name:
            torch.nn.init.zeros_(parameter)
    model.eval()
    return model


@variants
def test_the_paper_merges_by_the_mean_and_the_order_switches(variant: str) -> None:
    """One block and then another by hand: couple, swap for MEFT1 and MEFT2, average."""
    model = reversible(2, dtype=torch.float64, variant=variant, arithmetic="float")
    encoder = only_stack(model.eval())
    x1 = x2 = hidden = torch.randn(2, 3, 16, dtype=torch.float64)
    stack, _, couplings, _ = encoder.streams(hidden)
    for f, g in (couplings[:2], couplings[2:]):
        x1 = f.scale * x1 + stack.value(f, x2, {})
        x2 = g.scale * x2 + stack.value(g, x1, {})
        if variant != "meft3":
            x1, x2 = x2, x1
    torch.testing.assert_close(encoder(hidden), (x1 + x2) / 2)


@variants
@pytest.mark.parametrize("coupling", ["paper", "difference"])
def test_fixed_streams_by_hand(variant: str, coupling: str) -> None:
    """The same two blocks in integers: shift, add quanta, read the fresh stream."""
    model = reversible(2, variant=variant, lost_bits=3, coupling=coupling)
    encoder = only_stack(model.eval())
    hidden = torch.randn(2, 3, 16)
    stack, _, couplings, _ = encoder.streams(hidden)
    quanta = 2.0**FRACTION_BITS_WIDE
    pair = [(hidden * quanta).round().long() for _ in range(2)]
    for each in couplings:
        source = pair[1 - each.target]
        value = stack.value(each, (source / quanta).float(), {})
        carried = pair[each.target]
        if each.scale < 1:
            carried = (carried - source if coupling == "difference" else carried) // 8
        pair[each.target] = carried + (value * quanta).round().long()
    expected = (pair[fresh_stream(couplings)] / quanta).float()
    assert torch.equal(encoder(hidden), expected)


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


@variants
@pytest.mark.parametrize("span", [(0, 2), (2, 4), (1, 3)])
def test_the_span_decides_what_is_plain_rebuilt_or_stored(
    variant: str, span: tuple[int, int]
) -> None:
    """Below the span no adapters and nothing stored; the span stores streams and lost
    bits; above it adapters under ordinary autograd. Gradients are the twin's, bit for
    bit (figure 7)."""
    model = reversible(4, dropout=0.1, variant=variant, span=span)
    encoder = only_stack(model)
    assert set(encoder.adapters) == {str(i) for i in range(span[0], 4)}
    hidden = torch.randn(3, 7, 16)
    with saved_bytes(exclude=model.parameters()) as counter:
        out = encoder(hidden)  # noqa: F841
    streams = 2 * 3 * 7 * 16 * 4
    per_step = packed_bytes(3 * 7 * 16, 4) + 8
    if span[1] == 4:
        assert streams < counter.total <= streams + 2 * 4 * per_step
    else:
        assert counter.total > streams + 2 * 4 * per_step
    rebuilt = gradients(model, batch())
    encoder.backward_pass = "store"
    for name, expected in gradients(model, batch()).items():
        assert torch.equal(rebuilt[name], expected), name


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
    mamba = MambaForCausalLM(
        MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(
        meft.UnsupportedModelError, match=r"MambaForCausalLM.*BERT.*DeiT"
    ):
        meft.make_reversible(mamba, config)
    decoder = bert_config()
    decoder.is_decoder = True
    with pytest.raises(meft.UnsupportedModelError, match="is_decoder=False"):
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


def test_what_a_model_does_not_ask_for_is_not_refused() -> None:
    """`False` in the call goes before `True` in the config, as in transformers."""
    model = reversible(1, variant="meft1")
    model.config.output_hidden_states = True
    with pytest.raises(meft.UnsupportedCallError, match="output_hidden_states"):
        model(**batch())
    assert model(**batch(), output_hidden_states=False).loss.isfinite()


def test_data_parallel_replicas_are_refused() -> None:
    """They have no parameters of their own; torch marks them."""
    model = reversible(1, variant="meft1")
    replica: Any = only_stack(model)
    replica._is_replica = True
    with pytest.raises(meft.UnsupportedCallError, match="one process per device"):
        model(**batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "metf1"}, r"'metf1'; did you mean 'meft1'"),
        ({"backward": "rebuilt"}, "did you mean 'rebuild'"),
        ({"arithmetic": "int"}, "`arithmetic` must be one of"),
        ({"bottleneck_size": 0}, "at least 1"),
        ({"arithmetic": "float", "scale_1": 0.0}, "other than 0, got 0.0"),
        ({"scale_1": 0.5}, "set `lost_bits`"),
        ({"lost_bits": 17}, "0 to 16, got 17"),
        ({"lost_bits": -1}, "0 to 16"),
        ({"fraction_bits": 30}, "4 to 24, got 30"),
        ({"mlp_chunks": 0}, "at least 1"),
        ({"coupling": "diference"}, "did you mean 'difference'"),
        ({"on_mismatch": "ignore"}, "`on_mismatch` must be one of"),
        ({"gradient_dtype": "float16"}, "did you mean"),
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


# Task heads ------------------------------------------------------------------------


class Scored(BertForSequenceClassification):
    """A class of the user's, with a head and a parameter of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.my_head = nn.Sequential(nn.Linear(16, 3), nn.Dropout(0.1))
        self.temperature = nn.Parameter(torch.ones(()))


class MaskedLM(BertForMaskedLM):
    """As `BertForMaskedLM`: its head is pre-trained."""


class Assembled(PreTrainedModel):
    """Its base model is of transformers; its heads are new, or may be."""

    config_class = BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = BertModel(config)
        self.span = nn.Linear(16, 2)
        self.pool = BertPooler(config)


def new(model: nn.Module) -> set[str]:
    """Names of what trains after the conversion, but for adapters."""
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    named = model.named_parameters()
    return {n for n, p in named if p.requires_grad and ".adapters." not in n}


def test_heads_that_a_users_class_adds_are_trained() -> None:
    """What transformers has not made has no pre-trained weights."""
    model = Scored(bert_config())
    assert new(model) == {
        "classifier.weight",
        "classifier.bias",
        "my_head.0.weight",
        "my_head.0.bias",
        "temperature",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert new(MaskedLM(bert_config())) == set()


def test_a_head_of_transformers_on_a_users_model_is_reported() -> None:
    """It may be pre-trained: it stays frozen, and the warning says how to train it."""
    model = Assembled(bert_config())
    with pytest.warns(meft.FrozenWarning, match="`pool` is frozen") as seen:
        assert new(model) == {"span.weight", "span.bias"}
    assert len(seen) == 1
    advice = re.findall("Call `(.*?)`", str(seen[0].message))[0]
    eval(advice, {"model": model})
    assert all(p.requires_grad for p in model.pool.parameters())


def test_every_classifier_of_a_wrapper_is_trained() -> None:
    """Of two models in a module, both heads; also inside a list."""
    model = nn.Module()
    model.one = classifier(1)
    model.others = nn.ModuleList([classifier(1), Scored(bert_config())])
    heads = {name.rpartition(".")[0] for name in new(model)}
    assert heads == {
        "one.classifier",
        "others.0.classifier",
        "others.1.classifier",
        "others.1.my_head.0",
        "others.1",
    }


def test_a_frozen_head_of_any_model_inside_is_reported() -> None:
    """The advice has the path of the head in the model that was converted."""
    model = nn.Module()
    model.one, model.other = classifier(1), classifier(1)
    model.other.classifier.requires_grad_(False)
    with pytest.warns(meft.FrozenWarning, match=r"`other\.classifier` is frozen"):
        meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))


def test_sparse_adapters_train_the_same_heads() -> None:
    """As `make_reversible` does."""
    model: Any = Scored(bert_config())
    meft.add_sparse_adapters(model, meft.SparseConfig(num_neurons=16, top_k_neurons=2))
    assert model.temperature.requires_grad
    assert model.my_head[0].weight.requires_grad
    assert not model.bert.pooler.dense.weight.requires_grad
