"""The search for the largest value that fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_bench.parent.fit_records import caveat_of
from meft_bench.virtual.prediction.fit import largest_that_fits


@given(
    base=st.floats(0, 100),
    slope=st.floats(0.01, 10),
    bend=st.floats(0, 0.01),
    room=st.floats(0, 2000),
    at_most=st.integers(1, 5000),
)
def test_the_answer_fits_and_the_next_does_not(
    base: float, slope: float, bend: float, room: float, at_most: int
) -> None:
    """Whatever the curve is, and both were probed."""

    def needs(value: int) -> float:
        return base + slope * value + bend * value**2

    found = largest_that_fits(needs, room, at_most)
    wanted = max((v for v in range(1, at_most + 1) if needs(v) <= room), default=0)
    assert found.largest == wanted
    assert all(needs(value) == known for value, known in found.probes.items())
    if wanted:
        assert wanted in found.probes
    if wanted < at_most:
        assert wanted + 1 in found.probes


@pytest.mark.parametrize("jagged", [0, 1, 7])
def test_a_line_needs_few_probes(jagged: int) -> None:
    """Also one with steps in it, as rounding makes them."""

    def needs(value: int) -> float:
        return 1000 + 10 * (value - value % (jagged + 1))

    found = largest_that_fits(needs, 9_999, at_most=100_000)
    assert needs(found.largest) <= 9_999 < needs(found.largest + 1)
    assert len(found.probes) <= (5 if not jagged else 16)


def test_what_cannot_be_run_does_not_fit() -> None:
    found = largest_that_fits(
        lambda value: float("inf") if value > 6 else value, 100, at_most=10
    )
    assert found.largest == 6


def test_another_question_is_another_search() -> None:
    """What a file holds is the answer to the same lengths, padding and margin."""
    asked = {
        caveat_of(margin, 1, seq, padding)
        for margin in (0.05, 0.053, 0.0, 0.004)
        for seq in ((), ("512",), ("p50=32", "max=512"))
        for padding in ("worst", "none")
    }
    assert len(asked) == 24
