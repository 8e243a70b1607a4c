"""Whether numbers fit into their streams: too large and not finite are two things."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.couplings import coupling
from meft.reversible.extremes import Extremes
from meft.reversible.fixed import Fixed
from meft.reversible.floating import Floating

NARROW, WIDE = torch.int32, torch.int64


@given(
    num_bits=st.integers(0, 16),
    difference=st.booleans(),
    scale=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=300)
def test_what_fits_is_the_same_in_both_widths(
    num_bits: int, difference: bool, scale: int, seed: int
) -> None:
    """Whatever streams and value are: if the extremes of 32-bit streams fit, before and
    after a coupling, then 64-bit streams hold the same numbers. So neither a clamped
    value nor a sum that wraps around goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, (2, 40), generator=generator)
    target, source = (drawn >> torch.randint(0, 32, (2, 40), generator=generator)).int()
    value = torch.randn(40, generator=generator) * 2.0 ** (scale - 14)
    one = coupling(2.0**-num_bits, difference)
    narrow, wide = (
        Fixed(compute_dtype=torch.float32, fraction_bits=14, stream_dtype=dtype)
        for dtype in (NARROW, WIDE)
    )
    extremes = Extremes(narrow)
    nothing = torch.zeros(1, 40)
    extremes.note(0, nothing, target[None])
    extremes.note(0, nothing, source[None])
    low, high = target.clone(), target.long()
    kept = narrow.couple_(low, source, value, one)
    kept_wide = wide.couple_(high, source.long(), value, one)
    extremes.note(0, value[None], low[None])
    if extremes.fit():
        assert torch.equal(low.long(), high)
        if kept is not None and kept_wide is not None:
            assert torch.equal(kept, kept_wide)
    wide.uncouple_(high, source.long(), value, one, kept_wide)
    assert torch.equal(high, target.long())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "fit", "finite"),
    [
        ([1.0, 2047.0], True, True),
        ([2048.5, 1.0], False, True),
        ([1.0, -1e30], False, True),
        ([NAN, 1.0], True, False),
        ([1.0, -INF], True, False),
        ([INF, 1e30], True, False),  # what follows an overflow is not too large
        ([1e30, INF], False, False),  # what follows clamping may be anything
    ],
)
def test_too_large_and_not_finite_are_two_things(
    values: list[float], fit: bool, finite: bool
) -> None:
    """The first is for wider streams, the second is left to a loss scaler."""
    arithmetic = Fixed(compute_dtype=torch.float32, fraction_bits=18)
    extremes = Extremes(arithmetic)
    for block, value in enumerate(values):
        tensor = torch.tensor([[0.5, value, -1.0]])
        extremes.note(block, tensor, arithmetic.enter(tensor))
    assert extremes.fit() == fit
    flag = extremes.finite()
    assert flag is not None
    assert bool(flag) == finite
    if not fit:
        block, greatest = extremes.first_too_large()
        assert greatest == pytest.approx(abs(values[block]))


def test_every_row_is_judged_by_itself() -> None:
    """A row that is not finite hides what is too large in itself, not in others."""
    arithmetic = Fixed(compute_dtype=torch.float32, fraction_bits=18)
    for values, fit, finite in (
        ([[NAN, 1.0], [1.0, 1.0]], True, [False, True]),
        ([[NAN, 1e30], [1.0, 1.0]], True, [False, True]),
        ([[NAN, 1.0], [1.0, 3e3]], False, [False, True]),
    ):
        extremes = Extremes(arithmetic)
        for block in range(2):
            column = torch.tensor(values)[:, block : block + 1]
            extremes.note(block, column, arithmetic.enter(column))
        flag = extremes.finite()
        assert flag is not None
        assert flag.tolist() == finite
        assert extremes.fit() == fit
        if not fit:
            assert extremes.first_too_large() == (1, 3e3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [NARROW, WIDE])
def test_the_limits_are_met_exactly(dtype: torch.dtype, sign: int) -> None:
    """The greatest value that one addition takes still fits, and the next float32 does
    not; a stream must stay below its limit. Where only a stream is too large, its block
    is returned without a value."""
    arithmetic = Fixed(
        compute_dtype=torch.float32, fraction_bits=14, stream_dtype=dtype
    )
    limit, unreached = arithmetic.limit
    greatest = sign * torch.tensor([limit])
    beyond = torch.nextafter(greatest, torch.tensor([sign * INF]))
    assert 0 < beyond.abs() - limit < 2.0**-20 * limit
    cases: list[tuple[Tensor, int, bool, float | None]] = [
        (greatest, unreached - 1, True, None),
        (beyond, 0, False, float(beyond.abs())),
        (torch.zeros(1), unreached, False, None),
        (greatest, unreached, False, None),
    ]
    for value, stream, fit, named in cases:
        extremes = Extremes(arithmetic)
        extremes.note(4, torch.ones(1, 1), torch.ones(1, 1, dtype=dtype))
        extremes.note(2, value[None], torch.tensor([[sign * stream]], dtype=dtype))
        assert extremes.fit() == fit
        if not fit:
            assert extremes.first_too_large() == (2, named)


def test_streams_of_floats_hold_everything() -> None:
    """Nothing is kept for them, and nothing read."""
    extremes = Extremes(Floating(compute_dtype=torch.float32, stream_dtype=torch.int32))
    extremes.note(0, torch.tensor([INF]), torch.tensor([NAN]))
    assert extremes.fit()
    assert extremes.finite() is None
