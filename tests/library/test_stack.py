"""A rebuilt stack is the function, and has the gradients, of its twin."""

from typing import Any

import pytest
import torch

import meft
from library.models import batch, gradient, gradients, only_stack, reversible
from marks import pairs, slow_but_for
from meft.reversible.integer_format import FRACTION_BITS_WIDE
from meft.reversible.packing import packed_bytes
from meft.reversible.twin import read
from meft.reversible.variants import fresh_stream
from meft.testing import saved_bytes, tolerance

VARIANTS = ["meft1", "meft2", "meft3"]
FLOAT: dict[str, Any] = {"arithmetic": "float"}
ONES: dict[str, Any] = {"arithmetic": "float", "scale_1": 1.0, "scale_2": 1.0}
FIXED: dict[str, Any] = {}
variants = pytest.mark.parametrize("variant", VARIANTS)
ways = pytest.mark.parametrize("options", [ONES, FIXED], ids=["float", "fixed"])


def twin_of(model: Any) -> Any:
    """The same model, storing its activations."""
    only_stack(model).backward_pass = "store"
    return model


def agree(
    rebuilt: dict[str, torch.Tensor],
    stored: dict[str, torch.Tensor],
    options: dict[str, Any],
    allowed: float = 1e-7,
) -> None:
    """Equal to the last bit with `fixed`, and to a relative error with `float`."""
    assert rebuilt.keys() == stored.keys()
    for name, expected in stored.items():
        if options is FIXED:
            assert torch.equal(rebuilt[name], expected), name
        else:
            error = (rebuilt[name] - expected).norm() / expected.norm()
            assert error <= allowed, name


@pytest.mark.parametrize("variant", slow_but_for(VARIANTS, "meft1"))
def test_gradcheck_through_two_blocks(variant: str) -> None:
    """The rebuilding backward agrees with finite differences in float64, for the input
    and for every trainable parameter."""
    model = reversible(2, hidden=4, dtype=torch.float64, variant=variant, **FLOAT)
    stack = only_stack(model.eval())
    trainable = [p for p in stack.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 4
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return stack(hidden)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (hidden, *trainable))


@variants
def test_the_gradient_of_rounding_is_that_of_the_identity(variant: str) -> None:
    """With `fixed` streams the function is a staircase; its gradient is that of the
    same coupling in floats, up to what the quanta move the point it is taken at."""
    small = {"meft1": (1 / 16, 1.0), "meft2": (1.0, 1 / 16), "meft3": (1 / 16, 1 / 16)}
    scale_1, scale_2 = small[variant]
    floats = {"arithmetic": "float", "scale_1": scale_1, "scale_2": scale_2}
    hidden, ends = torch.randn(2, 5, 16), []
    for options in ({"lost_bits": 4}, {**floats, "coupling": "difference"}):
        model = reversible(3, variant=variant, backward="store", **options)
        stack = only_stack(model.eval())
        x = hidden.clone().requires_grad_()
        _, streams, top, _ = stack.streams(x)
        fresh = streams.pair()[fresh_stream(top)]
        ends.append(torch.autograd.grad(fresh.carrier, x, torch.ones(2, 5, 16))[0])
    error = (ends[0] - ends[1]).norm() / ends[1].norm()
    assert error < 64 * 2.0**-FRACTION_BITS_WIDE


@variants
@ways
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_equals_the_twin(
    variant: str, options: dict[str, Any], dropout: float
) -> None:
    """Same loss to the last bit; the same gradients, in floats at scales of one to
    rounding; padding masks and dropout included, 6 blocks deep in float64."""
    model = reversible(
        6, dropout=dropout, dtype=torch.float64, variant=variant, **options
    )
    inputs = batch()
    torch.manual_seed(3)
    rebuilt_loss = model(**inputs).loss
    rebuilt = gradients(model, inputs)
    stored = gradients(twin_of(model), inputs)
    torch.manual_seed(3)
    assert torch.equal(rebuilt_loss, model(**inputs).loss)
    agree(rebuilt, stored, options, tolerance(torch.float64, 6))


@pairs(
    variant=VARIANTS,
    coupling=["difference", "paper"],
    lost_bits=slow_but_for([0, 1, 3, 4, 8, 16], 0, 3, 16),
    dtype=[torch.float32, torch.bfloat16],
)
def test_fixed_streams_have_the_twins_bits(
    variant: str, coupling: str, lost_bits: int, dtype: torch.dtype
) -> None:
    """Loss and every gradient, the embeddings' too, for every number of lost bits, both
    couplings, both gradient dtypes, and an MLP in three chunks."""
    for extra in ({}, {"gradient_dtype": "bfloat16"}, {"mlp_chunks": 3}):
        model = reversible(
            4,
            dropout=0.1,
            dtype=dtype,
            variant=variant,
            coupling=coupling,
            lost_bits=lost_bits,
            **extra,
        )
        model.bert.embeddings.requires_grad_(True)
        rebuilt = gradients(model, batch())
        agree(rebuilt, gradients(twin_of(model), batch()), FIXED)


@variants
def test_a_side_buffer_in_host_memory_changes_no_bit(variant: str) -> None:
    """The lost bits go out in the forward and come back in the backward, once each and
    counted to the byte; gradients are those without it."""
    near = reversible(3, dropout=0.1, variant=variant)
    far = reversible(3, dropout=0.1, variant=variant, side_buffer="host")
    expected = gradients(near, batch())
    agree(gradients(far, batch()), expected, FIXED)
    ledger = only_stack(far).ledger
    num_scaled = {"meft1": 2, "meft2": 3, "meft3": 5}[variant]
    num_bytes = num_scaled * packed_bytes(3 * 7 * 16, 4)
    assert (ledger.d2h_bytes, ledger.h2d_bytes) == (num_bytes, num_bytes)
    assert only_stack(near).ledger.d2h_bytes == 0


@variants
@ways
def test_one_optimizer_step_equals_the_twin(
    variant: str, options: dict[str, Any]
) -> None:
    """After AdamW the parameters of both agree as their gradients do."""
    stepped = []
    for backward in ("rebuild", "store"):
        model = reversible(
            3, dtype=torch.float64, variant=variant, backward=backward, **options
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        torch.manual_seed(3)
        model(**batch()).loss.backward()
        optimizer.step()
        stepped.append(trainable)
    for rebuilt, stored in zip(*stepped, strict=True):
        atol = 0.0 if options is FIXED else 1e-9
        torch.testing.assert_close(rebuilt, stored, rtol=atol, atol=atol)


@variants
@ways
def test_several_forwards_before_a_backward(
    variant: str, options: dict[str, Any]
) -> None:
    """Two forwards with their own masks and dropout, then one backward of the sum: the
    gradients are those of the twin, so nothing was overwritten."""
    model = reversible(3, dropout=0.3, dtype=torch.float64, variant=variant, **options)
    first, second = batch(), batch(rows=2, seq=5, padded=False)

    def summed() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (model(**first).loss + 2 * model(**second).loss).backward()
        return {n: gradient(p) for n, p in model.named_parameters() if p.requires_grad}

    rebuilt = summed()
    twin_of(model)
    agree(rebuilt, summed(), options)


@variants
def test_gradients_accumulate(variant: str) -> None:
    """Two backwards without `zero_grad()` add up, bit for bit."""
    model = reversible(2, variant=variant)
    once = gradients(model, batch())
    torch.manual_seed(3)
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(gradient(parameter), once[name] + once[name])


@variants
def test_dropout_is_replayed_and_repeatable(variant: str) -> None:
    """Under one seed a training step repeats bit for bit; the caller's generator moves
    by the same amount at any depth; evaluation leaves it alone."""
    model = reversible(2, dropout=0.5, variant=variant)
    once, again = gradients(model, batch()), gradients(model, batch())
    for name in once:
        assert torch.equal(once[name], again[name])
    other = gradients(model, batch(), seed=4)
    assert any(not torch.equal(once[name], other[name]) for name in once)

    hidden, after = torch.randn(2, 3, 16), []
    for depth in (2, 5):
        encoder = only_stack(reversible(depth, dropout=0.5, variant=variant))
        torch.manual_seed(5)
        encoder(hidden)
        after.append(torch.rand(1))
        encoder.eval()
        torch.manual_seed(5)
        before = torch.get_rng_state()
        encoder(hidden)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*after)


def test_every_part_draws_its_own_masks() -> None:
    """Two blocks, F and G of one block, and chunks of either do not share a mask."""
    from meft.reversible.rng import replayed

    draws = []
    for coupling in range(6):
        for part in range(3):
            with replayed(7, coupling, part, torch.device("cpu")):
                draws.append(tuple(torch.rand(4).tolist()))
    assert len(set(draws)) == 18


def test_changed_parameters_are_refused() -> None:
    """A step between forward and backward would rebuild with the wrong weights."""
    model = reversible(2, variant="meft1")
    loss = model(**batch()).loss
    with torch.no_grad():
        next(only_stack(model).adapters.parameters()).add_(1.0)
    with pytest.raises(meft.UnsupportedCallError, match="between forward and backward"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    """The rebuilding backward has no derivative, and says so before it runs; also where
    the incoming gradient is a constant, so that autograd itself would not notice."""
    model = reversible(2, variant="meft2")
    parameter = next(only_stack(model).adapters.parameters())
    loss = only_stack(model)(torch.randn(2, 3, 16)).sum()
    with pytest.raises(meft.UnsupportedCallError, match=r"create_graph.*'store'"):
        torch.autograd.grad(loss, parameter, create_graph=True)


@pytest.mark.parametrize("variant", slow_but_for(VARIANTS, "meft1"))
def test_double_backward_of_the_twin(variant: str) -> None:
    """The way out that the refusal names: with stored activations, second derivatives
    agree with finite differences in float64."""
    model = reversible(
        1, hidden=4, dtype=torch.float64, variant=variant, backward="store", **FLOAT
    )
    model.set_attn_implementation("eager")  # fused attention has no second derivative
    stack = only_stack(model.eval())
    trainable = [p for p in stack.parameters() if p.requires_grad][:2]
    hidden = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return stack(hidden)  # type: ignore[no-any-return]

    assert torch.autograd.gradgradcheck(run, (hidden, *trainable))


@pytest.mark.parametrize("retain", [True, False])
def test_backward_twice_only_on_request(retain: bool) -> None:
    """`retain_graph=True` gives the same gradients again; without, autograd refuses."""
    model = reversible(2, variant="meft3")
    parameter = next(only_stack(model).adapters.parameters())
    loss = model(**batch()).loss
    (once,) = torch.autograd.grad(loss, parameter, retain_graph=retain)
    if retain:
        assert torch.equal(once, torch.autograd.grad(loss, parameter)[0])
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, parameter)


@variants
@ways
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_autocast_is_entered_again_by_the_recompute(
    variant: str, options: dict[str, Any], num_chunks: int
) -> None:
    """Under BF16 autocast gradients stay the twin's: a recompute in float32 would be
    off by a bfloat16 rounding, far above this bound, and a backward that ran under
    autocast itself would differ in bits."""
    model = reversible(2, hidden=32, variant=variant, mlp_chunks=num_chunks, **options)
    inputs = batch()
    results = []
    for backward in ("rebuild", "store"):
        only_stack(model).backward_pass = backward
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        trained = (gradient(p) for p in model.parameters() if p.requires_grad)
        results.append(torch.cat([each.flatten() for each in trained]))
    if options is FIXED:
        assert torch.equal(*results)
    assert (results[0] - results[1]).norm() / results[1].norm() < 1e-3


@variants
def test_a_half_precision_backbone_keeps_float32_streams(variant: str) -> None:
    """Frozen weights in bfloat16, adapters and `float` streams in float32; gradients
    agree with the twin's."""
    model = reversible(2, dtype=torch.bfloat16, variant=variant, **ONES)
    encoder = only_stack(model)
    assert all(p.dtype == torch.float32 for p in encoder.adapters.parameters())
    hidden = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    with saved_bytes(exclude=model.parameters()) as counter:
        out = encoder(hidden)
    assert counter.total == 2 * 2 * 3 * 16 * 4
    assert out.dtype == torch.bfloat16
    rebuilt = gradients(model, batch())
    for name, expected in gradients(twin_of(model), batch()).items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=2e-2, atol=2e-3)


@variants
@ways
def test_gradients_reach_what_lies_below_the_stack(
    variant: str, options: dict[str, Any]
) -> None:
    """With the embeddings unfrozen their gradients are the twin's."""
    model = reversible(3, dtype=torch.float64, variant=variant, **options)
    model.bert.embeddings.requires_grad_(True)
    rebuilt = gradients(model, batch())
    assert any(name.startswith("bert.embeddings") for name in rebuilt)
    agree(rebuilt, gradients(twin_of(model), batch()), options)


@variants
@pytest.mark.parametrize("trains_input", [True, False])
def test_a_mask_that_wants_a_gradient_has_the_twins(
    variant: str, trains_input: bool
) -> None:
    """The arguments of blocks in addition to the stream, whether or not the stream's
    own input wants a gradient."""
    encoder = only_stack(reversible(3, variant=variant))
    found = []
    for backward in ("rebuild", "store"):
        encoder.backward_pass = backward
        torch.manual_seed(3)
        hidden = torch.randn(2, 5, 16, requires_grad=trains_input)
        mask = torch.randn(2, 1, 5, 5, requires_grad=True)
        encoder(hidden, attention_mask=mask).sin().sum().backward()
        assert (hidden.grad is not None) == trains_input
        assert mask.grad is not None
        found.append(mask.grad)
    assert torch.equal(*found)
    assert found[0].any()


def less_for_an_input_without_grad(
    module: Any, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """Another kernel, a few quanta off, where the input wants no gradient."""
    return output + (0.0 if args[0].requires_grad else 2.0**-8)


@variants
def test_an_input_wants_a_gradient_in_both_passes_or_in_none(variant: str) -> None:
    """The output of frozen embeddings wants none, every later input does. A forward
    that took this otherwise than the backward may run another kernel."""
    model = reversible(3, dropout=0.1, variant=variant)
    model.bert.embeddings.requires_grad_(False)
    encoder = only_stack(model)
    for index, block in enumerate(encoder.blocks):
        query = block.get_submodule("attention.self.query")
        for module in (query, *encoder.adapters_of(index).values()):
            module.register_forward_hook(less_for_an_input_without_grad)
    rebuilt = gradients(model, batch())
    agree(rebuilt, gradients(twin_of(model), batch()), FIXED)


@variants
@ways
def test_unfrozen_backbone_parameters_train_too(
    variant: str, options: dict[str, Any]
) -> None:
    """Whatever in the blocks has `requires_grad` gets the twin's gradient."""
    model = reversible(3, dtype=torch.float64, variant=variant, **options)
    for block in only_stack(model).blocks:
        block.output.LayerNorm.requires_grad_(True)  # type: ignore[union-attr]
    rebuilt = gradients(model, batch())
    assert sum("LayerNorm" in name for name in rebuilt) == 6
    agree(rebuilt, gradients(twin_of(model), batch()), options)


@variants
@ways
@pytest.mark.parametrize("side", [0, 1])
def test_a_stream_without_gradient_is_allowed(
    variant: str, options: dict[str, Any], side: int
) -> None:
    """A loss on one output stream alone has the twin's gradients."""
    model = reversible(2, dtype=torch.float64, variant=variant, **options)
    encoder = only_stack(model)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    parameters = list(encoder.adapters.parameters())
    results = []
    for backward in ("rebuild", "store"):
        encoder.backward_pass = backward
        stack, streams, *_ = encoder.streams(x)
        out = read(stack, streams.pair()[side]).sin().sum()
        grads = torch.autograd.grad(out, parameters, allow_unused=True)
        results.append([x.new_zeros(()) if g is None else g for g in grads])
    for rebuilt, stored in zip(*results, strict=True):
        atol = 0.0 if options is FIXED else 1e-9
        torch.testing.assert_close(
            rebuilt, stored.expand_as(rebuilt), rtol=atol, atol=atol, check_dtype=False
        )
