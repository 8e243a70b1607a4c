"""Lengths of the batches of a plan."""

import statistics

import pytest

from meft_bench.shared import lengths


def test_numbers_are_steps_in_order() -> None:
    assert lengths.of_batches(["64", "128", "32"], batch_size=8) == [64, 128, 32]
    assert lengths.longest(["64", "128", "32"]) == 128
    assert not lengths.is_distribution(["64", "128"])


def test_rows_of_one_are_batches_of_their_distribution() -> None:
    """Half of them are at most as long as the median, and the last is the longest."""
    texts = ["p50=200", "max=1000"]
    found = lengths.of_batches(texts, batch_size=1)
    assert found[-1] == lengths.longest(texts) == 1000
    assert len(found) == lengths.NUM_STEPS + 1
    assert statistics.median(found[:-1]) == 200
    assert sorted(found) != found
    assert lengths.of_batches(texts, batch_size=1) == found


def test_a_batch_is_as_long_as_its_longest_row() -> None:
    """Of evenly spread rows, the median of the maximum of n is 2 ** (-1 / n)."""
    for rows in (1, 4, 32):
        found = lengths.of_batches(["max=10000"], batch_size=rows)
        expected = 10000 * 2 ** (-1 / rows)
        assert statistics.median(found[:-1]) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["0"], "'0' should be a number of tokens"),
        (["12k"], "'12k' should be a number of tokens"),
        (["64", "max=128"], "'64' should be a number of tokens"),
        (["p50=64"], "the largest length is missing: give max=TOKENS"),
        (["p50=64", "p50=65", "max=128"], "'p50=65': the same share"),
        (["max=64", "max=128"], "'max=128': the same share"),
        (["p50=300", "p90=200", "max=768"], "at 90 % is 200, below the 300"),
        (["p50=300", "max=200"], "at 100 % is 200, below the 300"),
        (["p500=3", "max=200"], "'p500=3' should be"),
        (["p50=0", "max=200"], "'p50=0' should be"),
    ],
)
def test_what_is_no_length_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lengths.check(texts)
