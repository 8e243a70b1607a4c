"""The exact inverse: integers round the trip whatever is thrown at them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.couplings import coupling
from meft.reversible.fixed import Fixed, lost_bits
from meft.reversible.integer_format import LIMITS
from meft.reversible.packing import pack, packed_bytes, put_back_, widths

ARITHMETIC = Fixed(compute_dtype=torch.float32, fraction_bits=14)
WIDE = Fixed(compute_dtype=torch.float32, fraction_bits=14, stream_dtype=torch.int64)
either = pytest.mark.parametrize("arithmetic", [ARITHMETIC, WIDE], ids=["32", "64"])
EXTREMES = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]
VALUES = [0.0, -0.0, 1e-45, 0.5 * 2.0**-14, 1.5 * 2.0**-14, 3e4, -3.3e4, 1e38]
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]


@given(
    num_bits=st.integers(1, 32),
    num_values=st.integers(1, 300),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(deadline=None)
def test_packing_goes_round_and_takes_what_it_says(
    num_bits: int, num_values: int, dtype: torch.dtype
) -> None:
    """Every number of bits, every length: the same values, to the byte."""
    num_bits = min(num_bits, 31) if dtype == torch.int64 else num_bits
    torch.manual_seed(num_bits * 1000 + num_values)
    values = torch.randint(-(2**31), 2**31, (num_values,)).to(dtype)
    words = pack(values, num_bits)
    assert words.dtype == torch.int32
    mask = torch.tensor((1 << num_bits) - 1).to(dtype)
    back = values & ~mask
    put_back_(back, words, num_bits)
    assert torch.equal(back, values)
    assert words.nbytes == packed_bytes(num_values, num_bits)
    assert sum(widths(num_bits)) == num_bits


def test_packing_wastes_nothing_on_whole_words() -> None:
    """n elements of k bits take k n / 8 bytes, whatever k is."""
    for num_bits in range(1, 17):
        assert packed_bytes(32 * 50, num_bits) == num_bits * 32 * 50 // 8


@given(
    num_bits=st.integers(0, 16),
    size=st.integers(1, 50),
    difference=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    arithmetic=st.sampled_from([ARITHMETIC, WIDE]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=300)
def test_uncouple_inverts_couple_bit_for_bit(
    num_bits: int,
    size: int,
    difference: bool,
    dtype: torch.dtype,
    arithmetic: Fixed,
    seed: int,
) -> None:
    """Random and extreme integers, infinities and not-a-number, in either width: sums
    wrap around on the way up and back again on the way down."""
    generator = torch.Generator().manual_seed(seed)
    shift = 32 if arithmetic is WIDE else 0

    def integers() -> torch.Tensor:
        drawn = torch.randint(-(2**31), 2**31, (1, size, 6), generator=generator)
        drawn = (drawn << shift) + torch.randint(0, 2**shift, drawn.shape)
        drawn[0, 0] = torch.tensor(EXTREMES[1:-1] + [e << shift for e in EXTREMES[::5]])
        return drawn.to(arithmetic.stream_dtype)

    target, source = integers(), integers()
    value = torch.randn(1, size, 6, generator=generator) * 100
    special = torch.tensor([*NOT_FINITE, *VALUES])
    value.view(-1)[: len(special)] = special[: value.numel()]
    value = value.to(dtype)
    one = coupling(2.0**-num_bits, difference)
    assert lost_bits(one) == num_bits
    stream = target.clone()
    kept = arithmetic.couple_(stream, source, value, one)
    assert (0 if kept is None else kept.nbytes) == packed_bytes(size * 6, num_bits)
    arithmetic.uncouple_(stream, source, value, one, kept)
    assert torch.equal(stream, target)


@either
@pytest.mark.parametrize("difference", [True, False])
@pytest.mark.parametrize("num_bits", [0, 1, 4, 9])
def test_where_the_stack_starts_nothing_has_to_be_kept(
    difference: bool, num_bits: int, arithmetic: Fixed
) -> None:
    """Both streams are equal there, so the source has the bits."""
    target = torch.randint(-(2**31), 2**31, (2, 3, 5)).to(arithmetic.stream_dtype)
    one = coupling(2.0**-num_bits, difference, starts=True)
    stream, value = target.clone(), torch.randn(2, 3, 5)
    assert arithmetic.couple_(stream, target, value, one) is None
    arithmetic.uncouple_(stream, target, value, one, None)
    assert torch.equal(stream, target)


def test_a_shift_is_a_scale_that_rounds_down() -> None:
    """(-3 >> 1) + 2 = 0 and (-7 >> 2) + 2 = 0: the arithmetic shift is a floor."""
    for start, num_bits in ((-3, 1), (-7, 2)):
        stream = torch.tensor([[[start]]], dtype=torch.int32)
        value = torch.tensor([[[2 * 2.0**-14]]])
        ARITHMETIC.couple_(
            stream, stream.clone(), value, coupling(2.0**-num_bits, False)
        )
        assert stream.item() == 0


@either
def test_quanta_are_the_nearest_half_to_even(arithmetic: Fixed) -> None:
    """0.5, 1.5 and 2.5 quanta become 0, 2 and 2; beyond the limit values are clamped;
    not-a-number is 0."""
    quantum = 2.0**-14
    value = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]) * quantum
    assert arithmetic.quantise(value).tolist() == [0, 2, 2, 0, -2]
    limit = int(LIMITS[arithmetic.stream_dtype])
    wild = arithmetic.quantise(torch.tensor([*NOT_FINITE, 1e38, -1e38]))
    assert wild.tolist() == [limit, -limit, 0, limit, -limit]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hidden_states_enter_and_leave_unchanged(
    dtype: torch.dtype,
) -> None:
    """A quantum of 2^-14 is finer than half precision for values from 2^-3 (float16)
    or 2^-6 (bfloat16) up: those are read as they were entered."""
    arithmetic = Fixed(compute_dtype=dtype, fraction_bits=14)
    hidden = (torch.rand(1, 50, 40) * 200 + 0.125).to(dtype)
    assert torch.equal(arithmetic.read(arithmetic.enter(hidden)), hidden)
