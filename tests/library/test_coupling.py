import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.reversible.coupling import couple, growth, uncouple
from meft.testing import tolerance

scales = st.sampled_from([0.1, 0.3, 1.0, -0.5])


@given(
    rows=st.integers(1, 4),
    seq=st.integers(1, 5),
    hidden=st.integers(1, 6),
    scale_1=scales,
    scale_2=scales,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_uncouple_inverts_couple(
    rows: int, seq: int, hidden: int, scale_1: float, scale_2: float, dtype: torch.dtype
) -> None:
    """Whatever F, G, shape, dtype and scales: one step back gives the inputs."""
    torch.manual_seed(0)
    x1, x2 = torch.randn(2, rows, seq, hidden, dtype=dtype)
    y1, y2 = couple(x1, x2, torch.sin, torch.cos, scale_1, scale_2)
    back = uncouple(y1, y2, torch.sin, torch.cos, scale_1, scale_2)
    allowed = tolerance(dtype, 1) / abs(scale_1 * scale_2)
    torch.testing.assert_close(back[0], x1, atol=allowed, rtol=allowed)
    torch.testing.assert_close(back[1], x2, atol=allowed, rtol=allowed)


def test_couple_by_hand() -> None:
    """y1 = 2 * 3 + 10 * 5 = 56 and y2 = 4 * 5 + (56 + 1) = 77."""
    x1, x2 = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 5.0)
    y1, y2 = couple(x1, x2, lambda x: 10 * x, lambda y: y + 1, 2.0, 4.0)
    assert (y1.item(), y2.item()) == (56.0, 77.0)


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
