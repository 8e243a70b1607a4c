import copy
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import meft
from library.models import bert_config, gradient
from meft.linear_cross_entropy import (
    liger_linear_cross_entropy,
    linear_cross_entropy,
    plain_linear_cross_entropy,
)
from meft.testing import saved_bytes

TOKENS, HIDDEN, VOCAB = 37, 16, 301
ONE_CHUNK = 1000

wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
biases = pytest.mark.parametrize("with_bias", [False, True])
divisors = pytest.mark.parametrize("num_items", [None, 1, 17, torch.tensor(23)])
chunks = pytest.mark.parametrize("chunk_tokens", [1, 7, 36, 37, ONE_CHUNK])


def some_labels(tokens: int = TOKENS) -> Tensor:
    """Classes, every fifth of them ignored."""
    torch.manual_seed(1)
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[::5] = -100
    return labels


def leaves(
    dtype: torch.dtype = torch.float32, with_bias: bool = False, tokens: int = TOKENS
) -> list[Tensor]:
    """Hidden states, weight and perhaps a bias, which want gradients."""
    torch.manual_seed(0)
    shapes = [(tokens, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    tensors = [torch.randn(shape, dtype=torch.float64).mul(0.6) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in tensors[: 3 if with_bias else 2]]


def results(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    labels: Tensor,
    upstream: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """Loss and gradients."""
    hidden, weight, *bias = inputs
    loss = function(hidden, weight, labels, *bias, **options)
    gradients = torch.autograd.grad(loss * upstream, inputs)
    return [loss.detach(), *gradients]


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@biases
@divisors
def test_with_one_chunk_it_is_the_twin_bit_for_bit(
    dtype: torch.dtype, with_bias: bool, num_items: Tensor | int | None
) -> None:
    """Loss and gradients, whatever they are divided by."""
    inputs, labels = leaves(dtype, with_bias), some_labels()
    expected = results(plain_linear_cross_entropy, inputs, labels, num_items=num_items)
    got = results(
        linear_cross_entropy,
        inputs,
        labels,
        num_items=num_items,
        chunk_tokens=ONE_CHUNK,
    )
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def rounding(dtype: torch.dtype) -> float:
    """Relative error, over a whole tensor, of a few roundings to `dtype` in a row."""
    return 4 * torch.finfo(dtype).eps


@dtypes
@chunks
def test_chunks_change_nothing_but_rounding(
    dtype: torch.dtype, chunk_tokens: int
) -> None:
    """Held against the twin in float64."""
    inputs, labels = leaves(dtype, with_bias=True), some_labels()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = results(plain_linear_cross_entropy, exact, labels)
    got = results(linear_cross_entropy, inputs, labels, chunk_tokens=chunk_tokens)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < rounding(dtype)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@chunks
def test_autocast_means_what_it_means_to_a_linear_layer(
    autocast: torch.dtype, chunk_tokens: int
) -> None:
    """Float32 leaves, half-precision products, a float32 loss and float32 gradients:
    the loss is the twin's under the same autocast but for the order of its sum."""
    inputs, labels = leaves(), some_labels()
    with torch.autocast("cpu", autocast):
        expected = results(plain_linear_cross_entropy, inputs, labels)
        got = results(linear_cross_entropy, inputs, labels, chunk_tokens=chunk_tokens)
    assert relative_error(got[0], expected[0]) < rounding(torch.float32)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert relative_error(one, other) < rounding(autocast)
        if chunk_tokens == ONE_CHUNK and autocast == torch.bfloat16:
            assert torch.equal(one, other)


@biases
@pytest.mark.parametrize("num_items", [None, 3])
def test_gradients_are_those_of_finite_differences(
    with_bias: bool, num_items: int | None
) -> None:
    """In float64, over several chunks, with ignored labels."""
    torch.manual_seed(0)
    shapes = [(5, 3), (7, 3), (7,)][: 3 if with_bias else 2]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    labels = torch.tensor([6, -100, 0, 3, 3])

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, *bias, num_items=num_items, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_a_second_derivative_is_refused() -> None:
    """The first ones are computed without a graph. Autograd itself would take them for
    constants, and leave their part out of the derivative of a sum."""
    hidden, weight = leaves()
    loss = linear_cross_entropy(hidden, weight, some_labels())
    with pytest.raises(meft.UnsupportedCallError, match="create_graph"):
        torch.autograd.grad(loss + hidden.square().sum(), hidden, create_graph=True)


def test_backward_twice_gives_the_same() -> None:
    """What is kept for backward is not changed by one."""
    inputs = leaves()
    loss = linear_cross_entropy(inputs[0], inputs[1], some_labels(), chunk_tokens=7)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(2 * loss, inputs)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(2 * one, other)


def test_float16_gradients_wait_for_the_loss_scaler() -> None:
    """A mean over four million tokens makes gradients too small for float16. Scaling
    the loss saves those of the twin; it comes after ours were taken, and saves them as
    well."""
    inputs, labels = leaves(torch.float16), some_labels()
    options = {"num_items": 2**22}
    exact = [t.detach().double().requires_grad_() for t in inputs]
    scale = 2.0**16
    expected = results(plain_linear_cross_entropy, exact, labels, scale, **options)
    twin = results(plain_linear_cross_entropy, inputs, labels, **options)
    got = results(linear_cross_entropy, inputs, labels, scale, **options)
    enough = rounding(torch.float16)
    for unscaled, one, other in zip(twin[1:], got[1:], expected[1:], strict=True):
        assert relative_error(scale * unscaled.double(), other) > 4 * enough
        assert relative_error(one, other) < enough


def test_a_float16_weight_gradient_does_not_overflow_before_it_is_scaled() -> None:
    """A thousand tokens of one class with large hidden states: the sum over tokens is
    beyond float16, the mean is not."""
    hidden = torch.full((1024, HIDDEN), 200.0, dtype=torch.float16)
    weight = nn.Parameter(torch.zeros(VOCAB, HIDDEN, dtype=torch.float16))
    labels = torch.zeros(1024, dtype=torch.long)
    linear_cross_entropy(hidden, weight, labels).backward()
    exact = 200 * (1 / VOCAB - 1)
    assert gradient(weight)[0, 0].item() == pytest.approx(exact, rel=1e-3)


@wide
def test_with_all_labels_ignored_gradients_are_zero(dtype: torch.dtype) -> None:
    """And the loss is 0 / 0, or 0 if something else divides it, as for torch. That also
    holds if the divisor is 0, which the `Trainer` passes then."""
    inputs, labels = leaves(dtype), torch.full((TOKENS,), -100)
    for num_items in (None, 4, torch.tensor(0)):
        expected = results(
            plain_linear_cross_entropy, inputs, labels, num_items=num_items
        )
        got = results(
            linear_cross_entropy, inputs, labels, num_items=num_items, chunk_tokens=7
        )
        torch.testing.assert_close(got[0], expected[0], equal_nan=True, rtol=0, atol=0)
        for one, other in zip(got[1:], expected[1:], strict=True):
            assert torch.equal(one, other)
            assert not one.any()


def test_an_empty_batch_is_a_sum_of_nothing() -> None:
    """Its gradients are empty, or 0."""
    inputs, labels = leaves(tokens=0), torch.empty(0, dtype=torch.long)
    loss, d_hidden, d_weight = results(
        linear_cross_entropy, inputs, labels, num_items=1
    )
    assert loss.item() == 0
    assert d_hidden.shape == (0, HIDDEN)
    assert not d_weight.any()
    assert results(linear_cross_entropy, inputs, labels)[0].isnan()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_the_loss(bad: float) -> None:
    """One bad hidden state makes the loss not-a-number, so that a loss scaler sees it;
    at an ignored token it does not."""
    inputs, labels = leaves(), some_labels()
    with torch.no_grad():
        inputs[0][6, 0] = bad
    assert linear_cross_entropy(inputs[0], inputs[1], labels, chunk_tokens=4).isnan()
    labels[6] = -100
    assert linear_cross_entropy(inputs[0], inputs[1], labels, chunk_tokens=4).isfinite()


@pytest.mark.parametrize("ignore_index", [0, 7, -1])
def test_any_label_can_be_the_ignored_one(ignore_index: int) -> None:
    """Also one that is a class."""
    inputs, labels = leaves(), some_labels()
    labels[labels == -100] = ignore_index
    options = {"ignore_index": ignore_index}
    expected = results(plain_linear_cross_entropy, inputs, labels, **options)
    got = results(linear_cross_entropy, inputs, labels, **options)
    assert all(map(torch.equal, got, expected))


def test_a_label_that_is_no_class_is_an_error() -> None:
    """As for torch, and not a read beyond the end."""
    inputs, labels = leaves(), some_labels()
    labels[3] = VOCAB
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(inputs[0], inputs[1], labels)


class Seen(TorchDispatchMode):
    """Which operations ran, and how large their results were, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
                self.shapes.add(tuple(tensor.shape))
        return out


def frozen_head() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = leaves()
    return hidden, weight.detach(), some_labels()


@pytest.mark.parametrize("chunk_tokens", [7, 20])
def test_nothing_is_larger_than_the_logits_of_a_chunk(chunk_tokens: int) -> None:
    """Forward and backward, with a frozen head; its gradient is not computed either.
    The twin's largest tensor has all logits."""
    hidden, weight, labels = frozen_head()
    with Seen() as seen:
        linear_cross_entropy(
            hidden, weight, labels, chunk_tokens=chunk_tokens
        ).backward()
    assert seen.largest == max(chunk_tokens * VOCAB, VOCAB * HIDDEN)
    made = seen.shapes - {(HIDDEN, VOCAB)}  # the weight's transpose, a view
    assert (VOCAB, HIDDEN) not in made
    with Seen() as seen:
        plain_linear_cross_entropy(hidden, weight, labels).backward()
    assert seen.largest == TOKENS * VOCAB


def test_without_grad_there_is_no_gradient() -> None:
    """Evaluation computes the loss and nothing else, although inputs want gradients."""
    inputs, labels = leaves(), some_labels()
    with torch.no_grad(), Seen() as seen:
        loss = linear_cross_entropy(inputs[0], inputs[1], labels, chunk_tokens=7)
    assert "_log_softmax" in seen.names
    assert "_log_softmax_backward_data" not in seen.names
    assert torch.equal(
        loss, linear_cross_entropy(inputs[0], inputs[1], labels, chunk_tokens=7)
    )


@dtypes
def test_saved_is_a_gradient_of_the_hidden_states(dtype: torch.dtype) -> None:
    """tokens hidden numbers in their own dtype, and a scalar; with a head that trains
    vocab hidden numbers more, in float32 or wider."""
    hidden, weight = leaves(dtype)
    labels = some_labels()
    scalar = torch.promote_types(dtype, torch.float32).itemsize
    with saved_bytes() as counter:
        loss = linear_cross_entropy(hidden, weight.detach(), labels)
    assert counter.total == TOKENS * HIDDEN * dtype.itemsize + scalar
    with saved_bytes() as counter:
        loss = linear_cross_entropy(hidden, weight, labels)
    head = VOCAB * HIDDEN * scalar
    assert counter.total == TOKENS * HIDDEN * dtype.itemsize + head + scalar
    with saved_bytes() as counter:
        loss = plain_linear_cross_entropy(hidden, weight.detach(), labels)  # noqa: F841
    assert counter.total >= TOKENS * VOCAB * scalar


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that tensors born in `step()` held at once."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    kineto = profile.profiler.kineto_results
    assert kineto is not None
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# Of `mkldnn.flags`, in builds that know no Intel GPU.
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@dtypes
def test_alive_are_the_logits_of_a_chunk_three_times(dtype: torch.dtype) -> None:
    """log p, its gradient and that of the logits, float32 or wider, whatever the number
    of tokens; beside them what is small: two tensors of [tokens, hidden], as the twin
    has, and a number per token."""
    chunk_tokens, tokens = 20, 200
    hidden, weight = leaves(dtype, tokens=tokens)
    weight, labels = weight.detach(), some_labels(tokens)

    def step() -> None:
        linear_cross_entropy(
            hidden, weight, labels, chunk_tokens=chunk_tokens
        ).backward()

    step()
    hidden.grad = None
    # What oneDNN's matrix products need in addition depends on the processor.
    with torch.backends.mkldnn.flags(enabled=False):
        peak = peak_bytes(step)
    wide_bytes = torch.promote_types(dtype, torch.float32).itemsize
    chunk = 3 * chunk_tokens * VOCAB * wide_bytes
    assert chunk <= peak < chunk + 2 * tokens * HIDDEN * wide_bytes + 40 * tokens
    assert peak < tokens * VOCAB * wide_bytes


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


def llama(kind: type[LlamaForCausalLM | MistralForCausalLM] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    configs = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}
    sizes: dict[str, int] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    return kind(configs[kind](**sizes))


def mistral() -> MistralForCausalLM:
    return cast(MistralForCausalLM, llama(MistralForCausalLM))


Build = Callable[[], Any]
families = pytest.mark.parametrize("build", [opt, llama, mistral])


def rows(count: int = 3, seq: int = 7) -> dict[str, Tensor]:
    """Tokens, padded in the first row; labels leave the padding out."""
    torch.manual_seed(2)
    ids = torch.randint(3, VOCAB, (count, seq))
    mask = torch.ones(count, seq, dtype=torch.long)
    mask[0, seq // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reversible(model: Any) -> Any:
    torch.manual_seed(1)
    meft.make_reversible(
        model, meft.ReversibleConfig(variant="meft1", bottleneck_size=3)
    )
    return model


def loss_and_gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | {n: gradient(p) for n, p in trained.items()}


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
    """Asked for predictions beside the loss it finds none, and does not fail."""
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


class Own(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Renamed(LlamaForCausalLM):
    """A subclass with the forward of its base is as good."""


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    )


@pytest.mark.parametrize(
    "model",
    [BertForMaskedLM(bert_config()), bart(), Own(llama().config)],
    ids=lambda model: type(model).__name__,
)
def test_other_classes_are_refused(model: PreTrainedModel) -> None:
    """By a message that says which are not."""
    names = "OPTForCausalLM, LlamaForCausalLM, MistralForCausalLM"
    with pytest.raises(meft.UnsupportedModelError, match=names):
        meft.chunk_loss(model)
    assert meft.chunk_loss(Renamed(llama().config))(**rows()).logits is None


def _with_more(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


def _with_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def _with_backward_hook(model: Any) -> None:
    model.lm_head.register_full_backward_hook(lambda *_: None)


def _with_loss(model: Any) -> None:
    model.loss_function = lambda **_: torch.zeros(())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_with_more, "not a plain `nn.Linear`"),
        (_with_hook, "on its `lm_head` a forward hook"),
        (_with_backward_hook, "on its `lm_head` a backward hook"),
        (_with_loss, "not `ForCausalLMLoss`"),
    ],
)
def test_what_would_be_bypassed_is_refused(
    change: Callable[[Any], None], says: str
) -> None:
    """A head that is more than a matrix, hooks on it, a loss of one's own: before, and
    at the call if it came later."""
    model = llama()
    change(model)
    with pytest.raises(meft.UnsupportedModelError, match=says):
        meft.chunk_loss(model)
    model = meft.chunk_loss(llama())
    change(model)
    with pytest.raises(meft.UnsupportedCallError, match=says):
        model(**rows())


def test_a_head_with_a_bias_is_a_plain_one() -> None:
    """No class of the three makes one, but nothing forbids it."""
    model = llama()
    model.lm_head = nn.Linear(HIDDEN, VOCAB)
    expected = loss_and_gradients(model, **rows())
    got = loss_and_gradients(meft.chunk_loss(model), **rows())
    assert "lm_head.bias" in got
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_replaced_forward_is_refused() -> None:
    """Ours, and anybody's."""
    model = meft.chunk_loss(llama())
    with pytest.raises(meft.UnsupportedModelError, match="chunked already"):
        meft.chunk_loss(model)
    model = llama()
    model.forward = model.forward
    with pytest.raises(meft.UnsupportedModelError, match="before that"):
        meft.chunk_loss(model)


def test_calls_that_want_logits_or_another_loss_are_refused() -> None:
    """Nothing is silently left out."""
    model = meft.chunk_loss(llama())
    with pytest.raises(meft.UnsupportedCallError, match="keeps no logits"):
        model(**rows(), logits_to_keep=2)
    with pytest.raises(meft.UnsupportedCallError, match="label_smoothing"):
        model(**rows(), label_smoothing=0.1)
    inputs = rows()
    inputs["labels"] = inputs["labels"][:, :5]
    with pytest.raises(ValueError, match=r"each of the \(3, 7\) tokens, .*\(3, 5\)"):
        model(**inputs)


def test_illegal_arguments_are_refused() -> None:
    """Before the model is touched."""
    model = llama()
    with pytest.raises(meft.ConfigError, match="at least 1, got 0"):
        meft.chunk_loss(model, chunk_tokens=0)
    with pytest.raises(meft.ConfigError, match="'torch' or 'liger', got 'triton'"):
        meft.chunk_loss(model, backend="triton")
    assert "forward" not in vars(model)


def test_without_liger_its_backend_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the model is changed, not at the first step."""
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(
        meft.ConfigError, match=r"CUDA device: `pip install 'meft\[liger\]'"
    ):
        meft.chunk_loss(llama(), backend="liger")


def fake_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `liger-kernel`, its signature (0.8) and the twin's arithmetic."""

    def liger_fused_linear_cross_entropy(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        logits = functional.linear(input, weight, bias).float()
        return functional.cross_entropy(
            logits, target, ignore_index=ignore_index, reduction=reduction
        )

    names = ["liger_kernel", "liger_kernel.transformers"]
    for name in [*names, "liger_kernel.transformers.functional"]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    functions = sys.modules["liger_kernel.transformers.functional"]
    functions.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]


def test_liger_is_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU is told so at the call, as it may have been about to move."""
    fake_liger(monkeypatch)
    model = meft.chunk_loss(llama(), backend="liger")
    with pytest.raises(meft.UnsupportedCallError, match="got hidden states on cpu"):
        model(**rows())


@divisors
def test_liger_is_called_as_it_wants_to_be(
    monkeypatch: pytest.MonkeyPatch, num_items: Any
) -> None:
    """With its own names for the arguments, on tensors that only say they are on CUDA:
    this shows the call, not the kernel. Its blind spot is refused."""
    fake_liger(monkeypatch)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    inputs, labels = leaves(with_bias=True), some_labels()
    labels[labels == -100] = 5
    options = {"num_items": num_items, "ignore_index": 5}
    expected = results(plain_linear_cross_entropy, inputs, labels, **options)
    got = results(liger_linear_cross_entropy, inputs, labels, **options)
    assert all(map(torch.equal, got, expected))
    hidden, weight, bias = inputs
    with pytest.raises(meft.UnsupportedCallError, match="no gradient"):
        liger_linear_cross_entropy(hidden.detach(), weight, labels, bias)
