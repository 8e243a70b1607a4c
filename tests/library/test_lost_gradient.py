"""The paper's scales lose the gradient in floating point: a known limit, tested.

Scales below 1 divide every rounding error on the way down. These tests hold the claim,
the numbers and the warning in place; `fixed` streams remove the cause.
"""

import dataclasses
import re
import warnings
from typing import Any

import pytest
import torch

import meft
from library.couplings import coupling
from library.models import batch, only_stack, reversible
from meft.reversible import blocks
from meft.reversible.coupling import growth
from meft.reversible.inverse_error import InverseErrorProbe, warning_text
from meft.testing import ReversibleReport, check_reversible, tolerance

DEPTH = 12


def report(variant: str, **options: Any) -> ReversibleReport:
    model = reversible(DEPTH, hidden=32, variant=variant, arithmetic="float", **options)
    return check_reversible(model, batch())


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_the_papers_scales_lose_the_gradient_at_depth_12(variant: str) -> None:
    """In float32 the top blocks train correctly and the lowest on noise: their
    gradients are off by more than half of their norm."""
    seen = report(variant)
    assert seen.gradient_error[-1] < 1e-4
    assert seen.gradient_error[0] > 0.5
    assert "bert.encoder.layer.0" in seen.lost_blocks
    assert f"bert.encoder.layer.{DEPTH - 1}" not in seen.lost_blocks


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
def test_fixed_streams_lose_nothing_there(variant: str) -> None:
    """The same stack with integer streams: every error is exactly 0."""
    seen = check_reversible(reversible(DEPTH, hidden=32, variant=variant), batch())
    assert set(seen.reconstruction_error) == {0.0}
    assert set(seen.gradient_error) == {0.0}
    assert seen.lost_blocks == ()


def test_the_twin_repeats_itself_on_a_cpu() -> None:
    """So that its own error is 0; a table shows that of kernels that do not."""
    seen = check_reversible(reversible(2, variant="meft1"), batch())
    assert seen.repeat_error == (0.0, 0.0)
    assert "stored twice" not in str(seen)
    noisy = dataclasses.replace(seen, repeat_error=(0.0, 1e-3))
    assert "stored twice" in str(noisy)
    assert "1.0e-03" in str(noisy)


def test_blocks_that_do_not_train_have_no_error() -> None:
    """Where none does there is nothing to compare, and it says so."""
    model = reversible(2, variant="meft1")
    stack = only_stack(model)
    for module in (stack[1], stack.adapters_of(1)):
        module.requires_grad_(False)
    seen = check_reversible(model, batch())
    assert seen.gradient_error == seen.repeat_error == (0.0, 0.0)
    model.requires_grad_(False)
    with pytest.raises(meft.UnsupportedCallError, match="nothing in the rebuilt"):
        check_reversible(model, batch())


@pytest.mark.parametrize("variant", ["meft1", "meft2"])
def test_the_error_grows_as_predicted(variant: str) -> None:
    """From block to block the reconstruction error grows about `growth()`-fold."""
    errors = report(variant).reconstruction_error
    # Between blocks 10 and 5: above is the first rounding, below it saturates.
    measured = (errors[5] / errors[10]) ** (1 / 5)
    assert measured == pytest.approx(growth(0.1, 1.0), rel=0.25)


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_one_keep_it(variant: str, dtype: torch.dtype) -> None:
    """The same stack with lambda = beta = 1 is exact to rounding at depth 12."""
    seen = report(variant, scale_1=1.0, scale_2=1.0, dtype=dtype)
    allowed = tolerance(dtype, DEPTH)
    assert max(seen.reconstruction_error) <= allowed
    assert max(seen.gradient_error) <= allowed
    assert seen.lost_blocks == ()


@pytest.mark.parametrize("variant", ["meft1", "meft2", "meft3"])
@pytest.mark.parametrize("depth", [4, 6, 8])
def test_the_estimate_is_near_the_error_of_the_gradients(
    variant: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the error lies between rounding and all of the gradient, the estimate,
    which costs nothing but samples, is between a third and ten times of what a
    comparison with the twin measures; rows are padded."""
    estimates: list[float] = []

    def text(numbers: Any, errors: list[float], *others: Any) -> None:
        estimates.extend(errors)
        assert (warning_text(numbers, errors, *others) is None) == (max(errors) <= 0.01)

    monkeypatch.setattr(blocks, "warning_text", text)
    model = reversible(depth, hidden=32, variant=variant, arithmetic="float")
    model(**batch()).loss.backward()
    measured = check_reversible(model, batch()).gradient_error
    pairs = list(zip(estimates, measured, strict=True))
    known = [(e, m) for e, m in pairs if 1e-5 < m < 0.7]
    assert known
    for estimate, error in known:
        assert estimate / 10 < error < estimate * 3


def test_padding_does_not_count() -> None:
    """What rounding does to tokens that receive no gradient is no error."""
    probe = InverseErrorProbe(num_samples=0)
    one, two = (coupling(0.1, False), coupling(0.1, False))
    pair = [dataclasses.replace(one, target=0), dataclasses.replace(two, target=1)]
    true = torch.ones(1, 2, 4)
    for index in range(2):
        probe.expect(pair, index, true)
    rebuilt = true.clone()
    rebuilt[:, 1] = 1e6  # of a padded token
    rebuilt[:, 0] *= 1.25
    gradient = torch.randn(1, 2, 4)
    gradient[:, 1] = 0
    probe.compare(1, rebuilt)
    probe.weigh(1, gradient)
    probe.weigh(0, gradient)
    assert probe.estimated_errors() == [pytest.approx(0.25)]


def test_the_first_step_warns_once_and_says_what_to_do() -> None:
    """The warning names the blocks and by how much they are wrong, the cause and the
    ways out; the second step is silent."""
    model = reversible(DEPTH, hidden=32, variant="meft3", arithmetic="float")
    with pytest.warns(meft.LostGradientWarning) as caught:
        model(**batch()).loss.backward()
    message = str(caught[0].message)
    assert re.search(r"those of block 8 by about \d\d%", message)
    assert "those of blocks 0-7 by 100% or more, which is noise" in message
    assert "`span=(9, 12)`" in message
    assert "arithmetic='fixed'" in message
    assert "backward='store'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch()).loss.backward()


def test_a_sound_stack_does_not_warn() -> None:
    """Three blocks at the paper's scales are fine in float32, as the error shows."""
    model = reversible(3, variant="meft1", arithmetic="float")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch()).loss.backward()


def test_the_suggested_span_is_sound() -> None:
    """Doing what the warning says silences it, because the gradient is there again."""
    model = reversible(
        DEPTH, hidden=32, variant="meft3", arithmetic="float", span=(9, 12)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch()).loss.backward()
    assert check_reversible(model, batch()).lost_blocks == ()
