import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.couplings import coupling
from meft.reversible.coupling import growth
from meft.reversible.floating import Floating
from meft.testing import tolerance


@given(
    rows=st.integers(1, 4),
    seq=st.integers(1, 5),
    hidden=st.integers(1, 6),
    scale=st.sampled_from([0.1, 0.3, 1.0, -0.5]),
    difference=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_floating_uncouple_inverts_couple(
    rows: int, seq: int, hidden: int, scale: float, difference: bool, dtype: torch.dtype
) -> None:
    """Whatever the value, shape, dtype and scale: a coupling back gives the target."""
    torch.manual_seed(0)
    target, source, value = torch.randn(3, rows, seq, hidden, dtype=dtype)
    arithmetic = Floating(compute_dtype=dtype, stream_dtype=dtype)
    stream = arithmetic.enter(target)
    one = coupling(scale, difference)
    arithmetic.couple_(stream, source, value, one)
    arithmetic.uncouple_(stream, source, value, one, None)
    allowed = tolerance(dtype, 1) / abs(scale)
    torch.testing.assert_close(stream, target, atol=allowed, rtol=allowed)


@pytest.mark.parametrize(("difference", "expected"), [(False, 56.0), (True, 46.0)])
def test_a_step_by_hand(difference: bool, expected: float) -> None:
    """2 * 3 + 50 = 56, and 2 * (3 - 5) + 50 = 46."""
    target, source = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 5.0)
    arithmetic = Floating(compute_dtype=torch.float32, stream_dtype=torch.float32)
    arithmetic.couple_(target, source, 10 * source, coupling(2.0, difference))
    assert target.item() == expected


@pytest.mark.parametrize(
    ("scales", "expected"),
    [((1.0, 1.0), 1.618), ((0.1, 1.0), 10.92), ((0.1, 0.1), 100.99)],
)
def test_growth_solves_its_equation(
    scales: tuple[float, float], expected: float
) -> None:
    """g^2 = (1 + g) / (scale_1 * scale_2), the positive root."""
    g = growth(*scales)
    assert g == pytest.approx(expected, abs=0.01)
    assert g * g == pytest.approx((1 + g) / (scales[0] * scales[1]))
