"""What a caller changes between forward and backward.

A recompute runs after the change. Either it gives the gradients of a stored graph, on
which the change has no effect, or the error says what was changed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import meft
from library.families import assert_same_bits, llama_config, text, twin_of
from library.models import batch, only_stack, reversible

Change = Callable[[PreTrainedModel], contextlib.AbstractContextManager[Any]]


def llama() -> PreTrainedModel:
    """One whose sums are long enough to depend on the number of threads."""
    torch.manual_seed(0)
    config = llama_config(LlamaConfig, 2)
    config.intermediate_size = 4096
    model: Any = LlamaForCausalLM(config)  # type: ignore[arg-type]
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft1"))
    return model.train()  # type: ignore[no-any-return]


def left_by(
    model: PreTrainedModel, change: Change, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of a backward that runs after a change."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    with change(model):
        loss.backward()
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@contextlib.contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    model.eval()
    yield
    assert not any(module.training for module in model.modules())
    model.train()


@contextlib.contextmanager
def training(model: PreTrainedModel) -> Iterator[None]:
    model.train()
    yield
    assert all(module.training for module in only_stack(model).modules())
    model.eval()


@contextlib.contextmanager
def two_threads(model: PreTrainedModel) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


@contextlib.contextmanager
def other_default_dtype(model: PreTrainedModel) -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic(model: PreTrainedModel) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def autocast(model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def plain_attention(
    model: PreTrainedModel,
) -> contextlib.AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def test_the_number_of_threads_decides_bits() -> None:
    """Else the case below would show nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(33, 4096), torch.randn(64, 4096)
    expected = linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    got = linear(x, weight)
    torch.set_num_threads(before)
    if torch.equal(got, expected):
        pytest.skip("the sums of this CPU do not depend on the number of threads")


@pytest.mark.parametrize(
    "change",
    [
        evaluation,
        two_threads,
        other_default_dtype,
        deterministic,
        autocast,
        plain_attention,
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_recompute_runs_as_the_forward_ran(change: Change, family: str) -> None:
    """Modes of modules (with dropout), threads, the default dtype, deterministic
    algorithms, autocast and attention's backend: gradients are those of the stored
    graph in every bit, and what the caller set stays set."""
    if family == "bert":
        model: PreTrainedModel = reversible(2, dropout=0.3, variant="meft1")
        inputs = batch(rows=2, seq=33, padded=False)
        # Something that depends on the default dtype.
        model.get_submodule("bert.encoder.layer.0.output.dense").register_forward_hook(
            lambda module, args, out: out + torch.full(out.shape, 1 / 3).to(out.dtype)
        )
    else:
        model, inputs = llama(), text()
        inputs["labels"] = inputs["input_ids"]
    rebuilt = left_by(model, change, inputs)
    assert_same_bits(rebuilt, left_by(twin_of(model), change, inputs))


def test_a_recompute_of_an_evaluation_is_one() -> None:
    """Gradients in evaluation mode, with `train()` before the backward: no dropout."""
    model = reversible(2, dropout=0.3, variant="meft2").eval()
    rebuilt = left_by(model, training, batch())
    assert_same_bits(rebuilt, left_by(twin_of(model.eval()), training, batch()))


# Named -------------------------------------------------------------------------------


def backward_after(
    change: Callable[[PreTrainedModel], object], hidden: int = 32, **options: Any
) -> None:
    model = reversible(2, hidden=hidden, variant="meft1", **options)
    loss = model(**batch(rows=2, seq=33, padded=False)).loss
    change(model)
    loss.backward()


def weight_of(model: PreTrainedModel) -> torch.nn.Parameter:
    return model.get_parameter("bert.encoder.layer.1.output.dense.weight")


def step_of_a_fused_optimizer(model: PreTrainedModel) -> None:
    trained = [p for p in only_stack(model).adapters.parameters()]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(trained, lr=0.1, fused=True).step()


def replace_data(model: PreTrainedModel) -> None:
    weight = weight_of(model)
    weight.data = weight.data.clone()


def add_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight_of(model).add_(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_in_place, r"`output.dense.weight` of block 1: it was updated in place"),
        (replace_data, r"block 1: it was replaced .*or its `.data` was"),
        (lambda m: m.to(torch.bfloat16), r"converted to torch.bfloat16 on cpu"),
        (lambda m: weight_of(m).requires_grad_(), r"`requires_grad` was set to True"),
    ],
    ids=["in place", "data replaced", "converted", "requires_grad"],
)
def test_changed_weights_are_named(change: Any, message: str) -> None:
    """Block, parameter and what happened to it."""
    with pytest.raises(meft.UnsupportedCallError, match=message):
        backward_after(change)


@pytest.mark.parametrize(
    "change",
    [step_of_a_fused_optimizer, lambda model: weight_of(model).data.add_(0.1)],
    ids=["fused", "data"],
)
def test_changes_that_torch_does_not_count_are_found_by_their_bits(change: Any) -> None:
    """A fused optimizer and `.data`: the checksum finds the block, and the error says
    what may have been done to it."""
    with pytest.raises(
        meft.ReconstructionError, match=r"block \d .*`.data` or by a fused optimizer"
    ):
        backward_after(change)


@pytest.mark.parametrize("on_mismatch", ["raise", "redo"])
def test_another_implementation_of_attention_is_named(on_mismatch: str) -> None:
    """`set_attn_implementation`, which a module reads when it runs."""
    expected = "the implementation of attention from sdpa to eager"
    reports: Any = pytest.raises(meft.ReconstructionError, match=expected)
    if on_mismatch == "redo":
        reports = pytest.warns(meft.MismatchWarning, match=expected)
    with reports:
        backward_after(
            lambda m: m.set_attn_implementation("eager"), on_mismatch=on_mismatch
        )


def test_another_precision_of_products_is_named() -> None:
    """As TF32 on a GPU: on CPUs that can, float32 products by way of bfloat16."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    x = torch.randn(8, 256)
    expected = x @ x.T

    def in_bfloat16(_: PreTrainedModel) -> None:
        matmul.fp32_precision = "bf16"

    try:
        in_bfloat16(reversible(1, variant="meft1"))
        if torch.equal(x @ x.T, expected):
            pytest.skip("this CPU has no products of float32 in less precision")
        matmul.fp32_precision = before
        with pytest.raises(
            meft.ReconstructionError,
            match=r"`torch.backends.mkldnn.matmul.fp32_precision` from 'none' to 'bf1",
        ):
            # Some CPUs compute smaller products as before.
            backward_after(in_bfloat16, hidden=256)
    finally:
        matmul.fp32_precision = before
