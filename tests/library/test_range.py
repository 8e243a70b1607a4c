"""Numbers of every size: streams widen where they have to, or a block is named.

Integers of 32 and of 64 bits hold the same quanta, so whatever the width the function
is the same; these tests hold it against the plain model and against the twin.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import meft
from library.families import (
    assert_same_bits,
    bart_config,
    gradients,
    llama_config,
    text,
    twin_of,
)
from library.models import batch as bert_batch
from library.models import only_stack
from library.models import reversible as reversible_bert
from meft.reversible.blocks import ReversibleBlocks, find_stacks
from meft.reversible.packing import packed_bytes
from meft.testing import check_reversible, saved_bytes

VARIANTS = ["meft1", "meft2", "meft3"]
variants = pytest.mark.parametrize("variant", VARIANTS)
NARROW, WIDE = torch.int32, torch.int64


def llama(
    dtype: torch.dtype = torch.float32, is_silent: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Tensor]]:
    """A tiny LLaMA, the same as a reversible model, and a batch.

    With `is_silent` its adapters add nothing.
    """
    torch.manual_seed(0)
    config = llama_config(LlamaConfig, 3)
    config.attention_dropout = 0.0
    plain: Any = LlamaForCausalLM(config)  # type: ignore[arg-type]
    plain.to(dtype)
    model = copy.deepcopy(plain)
    options = {"variant": "meft1", "bottleneck_size": 3, "lost_bits": 16, **options}
    meft.make_reversible(model, meft.ReversibleConfig(**options))
    if is_silent:
        for name, parameter in only_stack(model).adapters.named_parameters():
            if "up." in name:
                torch.nn.init.zeros_(parameter)
    inputs = text()
    inputs["labels"] = inputs["input_ids"]
    return plain, model.train(), inputs


def grow(model: PreTrainedModel, by: float, block: int = 1) -> None:
    """Scale one row of the last weight of a block's MLP."""
    blocks: Any = model.get_submodule("model.layers")
    with torch.no_grad():
        blocks[block].mlp.down_proj.weight[5].mul_(by)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


NAN, INF = float("nan"), float("inf")


# One function in two widths ----------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_width_changes_no_bit(variant: str, dtype: torch.dtype) -> None:
    """Loss and gradients with dropout, in every precision; rebuilt equals stored in
    either width."""
    found = []
    for width in (NARROW, WIDE):
        for backward in ("rebuild", "store"):
            model = reversible_bert(
                3, dropout=0.1, dtype=dtype, variant=variant, backward=backward
            )
            only_stack(model).stream_dtype = width
            found.append(gradients(model, bert_batch()))
            assert only_stack(model).stream_dtype == width
    for other in found[1:]:
        assert_same_bits(found[0], other)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lost_bits": 3, "mlp_chunks": 3, "side_buffer": "host"},
        {"coupling": "paper", "span": (0, 2)},
        {"on_mismatch": "redo", "gradient_dtype": "bfloat16"},
    ],
    ids=["default", "chunks", "span", "redo"],
)
def test_wide_streams_have_the_twins_bits(
    variant: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Values of 1e6, with every way in which a backward may rebuild."""
    _, model, inputs = llama(dtype, variant=variant, **options)
    grow(model, 1e6)
    rebuilt = gradients(model, inputs)
    assert only_stack(model).stream_dtype == WIDE
    assert all(gradient.isfinite().all() for gradient in rebuilt.values())
    assert_same_bits(rebuilt, gradients(twin_of(model), inputs))


def test_wide_streams_keep_eight_bytes_an_element_and_k_bits_a_coupling() -> None:
    """Per block what narrow ones keep: only the pair at the top is wider."""
    hidden = torch.randn(3, 7, 16)
    for depth in (2, 8):
        model = reversible_bert(depth, variant="meft1")
        stack = only_stack(model)
        stack.stream_dtype = WIDE
        with saved_bytes(exclude=model.parameters()) as counter:
            out = stack(hidden)  # noqa: F841
        kept = (depth - 1) * packed_bytes(hidden.numel(), 4)
        assert counter.total == 2 * hidden.numel() * 8 + kept + 8 * (2 * depth - 1)


def test_autocast_and_a_scaler_train_with_values_of_any_size() -> None:
    """Under FP16 autocast values between 32,768, the range in 32 bits, and FP16's
    greatest, 65,504: gradients are finite, and those of the twin."""
    _, model, inputs = llama(lost_bits=4)
    seen: list[float] = []
    down: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_hook(
        lambda *call: seen.append(call[2].detach()[..., 5].abs().max().item())
    )
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model(**inputs)
    grow(model, 5e4 / seen[-1])

    def scaled() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**inputs).loss
        torch.amp.GradScaler("cpu").scale(loss).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    rebuilt = scaled()
    assert max(seen[-3:]) > 2**15
    assert all(gradient.isfinite().all() for gradient in rebuilt.values())
    assert_same_bits(rebuilt, (twin_of(model), scaled())[1])


# Values that grow during training ----------------------------------------------------


def train(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a training step."""
    model.train()
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach()  # type: ignore[no-any-return]


def store(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return train(twin_of(model), inputs)


def evaluate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits  # type: ignore[no-any-return]


def evaluate_with_gradients(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> Tensor:
    return model.eval()(**inputs, use_cache=False).logits.detach()  # type: ignore[no-any-return]


def fill_a_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=True).logits  # type: ignore[no-any-return]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of four new tokens."""
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found: Any = model.eval().generate(
        **prompt,
        max_new_tokens=4,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.scores)


ways = pytest.mark.parametrize(
    "way",
    [train, store, evaluate, evaluate_with_gradients, fill_a_cache, generate],
)


@ways
@pytest.mark.parametrize("span", [None, (0, 1)], ids=["all", "span"])
def test_values_beyond_32_bits_after_a_good_step_are_right(
    way: Callable[..., Tensor], span: tuple[int, int] | None
) -> None:
    """One row of a `down_proj` is scaled after a step of the same shape: the numbers
    are those of the plain model, in training, evaluation and generation, of rebuilt and
    of stored blocks. With the range of 32 bits all of them were not-a-number."""
    plain, model, inputs = llama(is_silent=True, span=span)
    train(model, inputs)
    assert only_stack(model).stream_dtype == NARROW
    for each in (plain, model):
        grow(each, 1e7)
    expected = way(plain, inputs) if way is not store else train(plain, inputs)
    assert error(way(model, inputs), expected) < 1e-4
    # The next forward is as good, also of another shape, and without a second try.
    shorter = {name: tensor[:, -3:] for name, tensor in inputs.items()}
    assert error(evaluate(model, shorter), evaluate(plain, shorter)) < 1e-4


@ways
@pytest.mark.parametrize("span", [None, (0, 1)], ids=["all", "span"])
def test_values_beyond_64_bits_name_the_block_and_the_remedy(
    way: Callable[..., Tensor], span: tuple[int, int] | None
) -> None:
    """They raise before anything is returned, whichever way the model is used; with
    fewer fraction bits, as the message says, they fit."""
    for bits in (None, 4):
        _, model, inputs = llama(span=span, fraction_bits=bits)
        train(model, inputs)
        grow(model, 1e15)
        if bits is None:
            with pytest.raises(
                meft.UnsupportedCallError,
                match=r"block 1 computes values up to \d.*`fraction_bits` lower",
            ):
                way(model, inputs)
        else:
            assert way(model, inputs).isfinite().all()


def test_an_input_that_does_not_fit_is_reported_too() -> None:
    """Embeddings of 1e15: the error names the block that would read them."""
    _, model, inputs = llama()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(1e16)
    with pytest.raises(meft.UnsupportedCallError, match="block 0 computes values"):
        model(**inputs)


@pytest.mark.parametrize("way", [train, store, evaluate, generate])
def test_an_overflow_of_the_backbone_stays_not_a_number(
    way: Callable[..., Tensor],
) -> None:
    """FP16, weights that overflow it: no error of ours; scores are not-a-number as the
    plain model's are, so a scaler skips the step."""
    plain, model, inputs = llama(torch.float16)
    for each in (plain, model):
        grow(each, 6e4)
        grow(each, 6e4, block=0)
    assert not evaluate(plain, inputs).isfinite().all()
    assert not way(model, inputs).isfinite().all()
    if way in (train, store):
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert any(not gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("backward", ["rebuild", "store"])
@variants
def test_a_row_that_is_not_finite_leaves_the_others(
    variant: str, backward: str
) -> None:
    """As in the plain model: in evaluation, with and without a cache, and in training,
    where the other rows have the logits that they have next to a good row."""
    _, model, inputs = llama(variant=variant, backward=backward)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    broken = embedded.clone()
    broken[0, 1, 0] = NAN

    def logits(embeds: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(4)
        model.zero_grad()
        out: Tensor = model(inputs_embeds=embeds, **options).logits
        assert out[1:].isfinite().all()
        return out

    for is_training in (True, False):
        model.train(is_training)
        for options in ({"use_cache": False}, {"use_cache": True}):
            expected = logits(embedded, **options)
            found = logits(broken, **options)
            assert not found[0].isfinite().any()
            assert torch.equal(found[1:], expected[1:])


def test_generation_with_a_cache_is_generation_without() -> None:
    """Tokens and scores of a model that needs wide streams."""
    _, model, inputs = llama()
    grow(model, 1e6)
    cached = generate(model, inputs)
    model.generation_config.use_cache = False
    torch.testing.assert_close(generate(model, inputs), cached, rtol=1e-3, atol=1e-3)


def test_a_stream_that_grows_though_values_do_not_is_seen() -> None:
    """At a scale of 1 the difference of the streams grows 1.6-fold a block: beyond 32
    bits at 48 blocks, where wider streams are exact, and beyond 64 bits at 96."""
    model = reversible_bert(48, variant="meft1", lost_bits=0)
    rebuilt = gradients(model, bert_batch())
    assert only_stack(model).stream_dtype == WIDE
    assert_same_bits(rebuilt, gradients(twin_of(model), bert_batch()))
    with pytest.raises(meft.UnsupportedCallError, match="set `lost_bits` higher"):
        reversible_bert(96, variant="meft1", lost_bits=0)(**bert_batch())


# What else meets the width -----------------------------------------------------------


def test_each_stack_has_a_width_of_its_own() -> None:
    """BART: large values in the decoder leave the encoder's streams as they are."""
    torch.manual_seed(0)
    config: Any = bart_config(BartConfig, 2)
    model = BartForConditionalGeneration(config)
    meft.make_reversible(model, meft.ReversibleConfig(variant="meft2"))
    norm: Any = model.get_submodule("model.decoder.layers.1.final_layer_norm")
    torch.nn.init.constant_(norm.weight, 1e5)
    inputs = text()
    inputs["labels"] = inputs["input_ids"]
    rebuilt = gradients(model.train(), inputs)
    widths = {name: s.stream_dtype for name, s in find_stacks(model).items()}
    assert widths == {"model.encoder.layers": NARROW, "model.decoder.layers": WIDE}
    assert_same_bits(rebuilt, gradients(twin_of(model), inputs))


def test_a_copy_computes_the_same_function(tmp_path: Path) -> None:
    """Saved adapters, a state dict, `deepcopy` and `pickle`: the width is no part of
    what is saved, and evaluation is equal in every bit."""
    plain, model, inputs = llama(lost_bits=4)
    for each in (plain, model):
        grow(each, 1e6)
    expected = evaluate(model, inputs)
    assert only_stack(model).stream_dtype == WIDE
    meft.save_adapters(model, tmp_path)
    loaded = meft.load_adapters(copy.deepcopy(plain), tmp_path)
    _, by_state, _ = llama(lost_bits=4)
    by_state.load_state_dict(model.state_dict())
    for fresh in (loaded, by_state):
        assert only_stack(fresh).stream_dtype == NARROW
        assert torch.equal(evaluate(fresh, inputs), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert only_stack(copied).stream_dtype == WIDE
        assert torch.equal(evaluate(copied, inputs), expected)


def test_a_batch_that_is_not_finite_decides_nothing() -> None:
    """A first batch with infinite embeddings leaves the streams narrow, and the next
    one is an ordinary one."""
    _, model, _ = llama()
    stack = only_stack(model)
    hidden = torch.randn(2, 3, 16)
    rotary: Any = model.get_submodule("model.rotary_emb")
    places = rotary(hidden, torch.arange(3)[None])
    stack(torch.full_like(hidden, INF), position_embeddings=places)
    assert stack.stream_dtype == NARROW
    assert stack(hidden, position_embeddings=places).isfinite().all()


class _Reads(TorchDispatchMode):
    """Counts the values that the host waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize("backward", ["rebuild", "store"])
def test_a_forward_waits_for_one_value(depth: int, backward: str) -> None:
    """However deep it is, in evaluation; training draws a seed on the host besides. A
    rebuilding backward waits for one as well."""
    stack: ReversibleBlocks = only_stack(
        reversible_bert(depth, variant="meft1", backward=backward)
    )
    hidden = torch.randn(2, 3, 16)
    for mode, expected in ((True, 2), (False, 1)):
        out = stack.train(mode)(hidden)  # each branch is tried at the first call
        with _Reads() as reads:
            out = stack(hidden)
        assert reads.count == expected
        with _Reads() as reads:
            out.sum().backward()
        assert reads.count == (backward == "rebuild")


def test_the_report_of_a_wide_model_has_no_error() -> None:
    """`check_reversible` compares streams of both widths."""
    _, model, inputs = llama()
    grow(model, 1e6)
    report = check_reversible(model, inputs)
    assert set(report.reconstruction_error) == {0.0}
    assert set(report.gradient_error) == {0.0}
