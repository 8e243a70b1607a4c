"""The loss of a language-model head in chunks, compared with its plain twin."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import meft
from library.losses import (
    HIDDEN,
    TOKENS,
    VOCAB,
    Seen,
    divisors,
    leaves,
    relative_error,
    results,
    some_labels,
)
from library.models import gradient
from meft.linear_cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from meft.testing import saved_bytes

ONE_CHUNK = 1000
wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)

biases = pytest.mark.parametrize("with_bias", [False, True])
chunks = pytest.mark.parametrize("chunk_tokens", [1, 7, 36, 37, ONE_CHUNK])


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
    of tokens; the rest is small: two tensors of [tokens, hidden], as the twin
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
