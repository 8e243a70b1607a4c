from typing import Any

import pytest
import torch

import meft
from library.models import batch, gradient, gradients, reversible
from meft.reversible.convert import find_reversible
from meft.reversible.encoder import ReversibleEncoder
from meft.testing import saved_bytes, tolerance

VARIANTS = ["meft1", "meft2", "meft3"]
ONES: dict[str, Any] = {"scale_1": 1.0, "scale_2": 1.0}

variants = pytest.mark.parametrize("variant", VARIANTS)


def twin_of(model: Any) -> Any:
    """The same model, storing its activations."""
    find_reversible(model).backward_pass = "store"
    return model


@variants
def test_gradcheck_through_two_blocks(variant: str) -> None:
    """The rebuilding backward agrees with finite differences in float64, for the input
    and for every trainable parameter."""
    model = reversible(2, hidden=4, dtype=torch.float64, variant=variant).eval()
    encoder = find_reversible(model)
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 4
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return encoder(hidden).last_hidden_state  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (hidden, *trainable))


@variants
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_equals_the_twin_at_scales_of_one(variant: str, dropout: float) -> None:
    """Same loss to the last bit and the same gradients to rounding, padding masks and
    dropout included, 6 blocks deep in float64."""
    model = reversible(6, dropout=dropout, dtype=torch.float64, variant=variant, **ONES)
    inputs = batch()
    torch.manual_seed(3)
    rebuilt_loss = model(**inputs).loss
    rebuilt = gradients(model, inputs)
    stored = gradients(twin_of(model), inputs)
    torch.manual_seed(3)
    assert torch.equal(rebuilt_loss, model(**inputs).loss)
    assert rebuilt.keys() == stored.keys()
    allowed = tolerance(torch.float64, 6)
    for name, expected in stored.items():
        error = (rebuilt[name] - expected).norm() / expected.norm()
        assert error <= allowed, name


@variants
def test_one_optimizer_step_equals_the_twin(variant: str) -> None:
    """After AdamW the parameters of both agree as their gradients do."""
    stepped = []
    for backward in ("rebuild", "store"):
        model = reversible(
            3, dtype=torch.float64, variant=variant, backward=backward, **ONES
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        torch.manual_seed(3)
        model(**batch()).loss.backward()
        optimizer.step()
        stepped.append(trainable)
    for rebuilt, stored in zip(*stepped, strict=True):
        torch.testing.assert_close(rebuilt, stored, rtol=1e-9, atol=1e-9)


@variants
def test_only_the_two_streams_are_saved_at_any_depth(variant: str) -> None:
    """Saved for backward: 2 * batch * seq * hidden * 4 bytes, for depth 2, 8 and 32.
    The twin's bytes grow with every block."""
    hidden = torch.randn(3, 7, 16)
    saved: dict[str, list[int]] = {"rebuild": [], "store": []}
    for backward, totals in saved.items():
        for depth in (2, 8, 32):
            model = reversible(depth, dropout=0.1, variant=variant, backward=backward)
            encoder = find_reversible(model)
            with saved_bytes(exclude=model.parameters()) as counter:
                out = encoder(hidden)  # noqa: F841 (alive, see saved_bytes)
            totals.append(counter.total)
    assert saved["rebuild"] == [2 * 3 * 7 * 16 * 4] * 3
    first, second, third = saved["store"]
    assert (third - second) == 4 * (second - first) > 0


def test_full_fine_tuning_keeps_more_with_every_block() -> None:
    """The plain encoder's saved bytes are linear in depth."""
    from library.models import classifier

    hidden, totals = torch.randn(3, 7, 16), []
    for depth in (2, 8, 32):
        model = classifier(depth, dropout=0.1).train()
        with saved_bytes(exclude=model.parameters()) as counter:
            out = model.bert.encoder(hidden)  # noqa: F841
        totals.append(counter.total)
    assert totals[2] - totals[1] == 4 * (totals[1] - totals[0]) > 0


@variants
def test_several_forwards_before_a_backward(variant: str) -> None:
    """Two forwards with their own masks and dropout, then one backward of the sum: the
    gradients are those of the twin, so nothing was overwritten."""
    model = reversible(3, dropout=0.3, dtype=torch.float64, variant=variant, **ONES)
    first, second = batch(), batch(rows=2, seq=5, padded=False)

    def summed() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (model(**first).loss + 2 * model(**second).loss).backward()
        return {n: gradient(p) for n, p in model.named_parameters() if p.requires_grad}

    rebuilt = summed()
    twin_of(model)
    for name, expected in summed().items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=1e-7, atol=1e-9)


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
        encoder = find_reversible(reversible(depth, dropout=0.5, variant=variant))
        torch.manual_seed(5)
        encoder(hidden)
        after.append(torch.rand(1))
        encoder.eval()
        torch.manual_seed(5)
        before = torch.get_rng_state()
        encoder(hidden)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*after)


@variants
def test_every_branch_draws_its_own_masks(variant: str) -> None:
    """Two blocks, and F and G of one block, do not share a dropout mask."""
    from meft.reversible.rng import replayed

    draws = []
    for branch in range(6):
        with replayed(7, branch, torch.device("cpu")):
            draws.append(tuple(torch.rand(4).tolist()))
    assert len(set(draws)) == 6


def test_changed_parameters_are_refused() -> None:
    """A step between forward and backward would rebuild with the wrong weights."""
    model = reversible(2, variant="meft1")
    loss = model(**batch()).loss
    with torch.no_grad():
        next(find_reversible(model).adapters.parameters()).add_(1.0)
    with pytest.raises(meft.UnsupportedCallError, match="between forward and backward"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    """The backward is not differentiable, and says so."""
    model = reversible(2, variant="meft2")
    parameter = next(find_reversible(model).adapters.parameters())
    loss = model(**batch()).loss
    (once,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.parametrize("retain", [True, False])
def test_backward_twice_only_on_request(retain: bool) -> None:
    """`retain_graph=True` gives the same gradients again; without, autograd refuses."""
    model = reversible(2, variant="meft3")
    parameter = next(find_reversible(model).adapters.parameters())
    loss = model(**batch()).loss
    (once,) = torch.autograd.grad(loss, parameter, retain_graph=retain)
    if retain:
        assert torch.equal(once, torch.autograd.grad(loss, parameter)[0])
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, parameter)


@variants
def test_autocast_is_entered_again_by_the_recompute(variant: str) -> None:
    """Under BF16 autocast the streams stay float32 and the gradients stay the twin's:
    a recompute in float32 would be off by a bfloat16 rounding, far above this bound."""
    model = reversible(2, hidden=32, variant=variant, **ONES)
    inputs = batch()
    results = []
    for backward in ("rebuild", "store"):
        find_reversible(model).backward_pass = backward
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        trained = (gradient(p) for p in model.parameters() if p.requires_grad)
        results.append(torch.cat([each.flatten() for each in trained]))
    assert (results[0] - results[1]).norm() / results[1].norm() < 1e-3


@variants
def test_a_half_precision_backbone_keeps_float32_streams(variant: str) -> None:
    """Frozen weights in bfloat16, adapters and streams in float32; gradients agree with
    the twin's."""
    model = reversible(2, dtype=torch.bfloat16, variant=variant, **ONES)
    encoder = find_reversible(model)
    assert all(p.dtype == torch.float32 for p in encoder.adapters.parameters())
    hidden = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    with saved_bytes(exclude=model.parameters()) as counter:
        out = encoder(hidden).last_hidden_state
    assert counter.total == 2 * 2 * 3 * 16 * 4
    assert out.dtype == torch.bfloat16
    rebuilt = gradients(model, batch())
    for name, expected in gradients(twin_of(model), batch()).items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=2e-2, atol=2e-3)


@variants
def test_gradients_reach_what_lies_below_the_stack(variant: str) -> None:
    """With the embeddings unfrozen their gradients are the twin's."""
    model = reversible(3, dtype=torch.float64, variant=variant, **ONES)
    model.bert.embeddings.requires_grad_(True)
    rebuilt = gradients(model, batch())
    assert any(name.startswith("bert.embeddings") for name in rebuilt)
    for name, expected in gradients(twin_of(model), batch()).items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=1e-7, atol=1e-9)


@variants
def test_unfrozen_backbone_parameters_train_too(variant: str) -> None:
    """Whatever in the blocks has `requires_grad` gets the twin's gradient."""
    model = reversible(3, dtype=torch.float64, variant=variant, **ONES)
    for block in find_reversible(model).blocks:
        block.output.LayerNorm.requires_grad_(True)
    rebuilt = gradients(model, batch())
    assert sum("LayerNorm" in name for name in rebuilt) == 6
    for name, expected in gradients(twin_of(model), batch()).items():
        torch.testing.assert_close(rebuilt[name], expected, rtol=1e-7, atol=1e-9)


@variants
def test_a_stream_without_gradient_is_allowed(variant: str) -> None:
    """A loss on one output stream alone has the twin's gradients."""
    from meft.reversible.stack import run_rebuilt
    from meft.reversible.twin import run

    model = reversible(2, dtype=torch.float64, variant=variant)
    encoder = find_reversible(model)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    stack = encoder._stack(0, 2, seed=None, mask=None, kwargs={})
    parameters = list(encoder.adapters.parameters())
    results = []
    for runner in (run_rebuilt, run):
        y1, _ = runner(stack, x, x)
        grads = torch.autograd.grad(y1.sin().sum(), parameters, allow_unused=True)
        results.append([x.new_zeros(()) if g is None else g for g in grads])
    for rebuilt, stored in zip(*results, strict=True):
        torch.testing.assert_close(
            rebuilt, stored.expand_as(rebuilt), rtol=1e-7, atol=1e-9
        )


def test_the_encoder_keeps_no_tensor_of_a_forward() -> None:
    """Nothing hangs on the module between forward and backward."""
    encoder = find_reversible(reversible(2, dropout=0.1, variant="meft1"))

    def tensors(module: ReversibleEncoder) -> set[str]:
        return {k for k, v in vars(module).items() if isinstance(v, torch.Tensor)}

    before = tensors(encoder)
    encoder(torch.randn(2, 3, 16)).last_hidden_state.sum().backward()
    encoder(torch.randn(2, 3, 16))
    assert tensors(encoder) == before == set()
    assert encoder.probe is None
