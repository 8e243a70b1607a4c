"""Lengths of the batches of a plan, as `--seq` gives them.

    512                   every batch has rows of 512 tokens
    512 640 480           the lengths of several steps, in this order
    p50=190 p90=310 max=768   a distribution of the lengths of rows

Of a distribution, a batch is as long as its longest row. The plan runs `NUM_STEPS`
batches whose lengths divide the distribution of these maxima into equal parts, and then
one of the largest length. Between percentiles, and below the first, lengths are taken
to be spread evenly.
"""

import itertools
import random
import re
from collections.abc import Sequence

NUM_STEPS = 7
"""Number of batches that represent a distribution, besides the longest one."""
_PART = re.compile(r"(?:p(?P<percent>\d{1,2}(?:\.\d+)?)|max)=(?P<tokens>\d+)")
_ORDER = 0
"""Seed of the order of the steps, which must not be sorted: memory that the allocator
keeps depends on it."""


def check(texts: Sequence[str]) -> None:
    """Raise `ValueError` unless `of_batches` and `longest` understand the texts."""
    if not texts or all(text.isdecimal() and int(text) for text in texts):
        return
    points = _points(texts)
    for (_, shorter), (percent, longer) in itertools.pairwise(points):
        if longer < shorter:
            raise ValueError(
                f"the length at {percent:g} % is {longer}, below the {shorter} of a "
                "smaller share of the rows"
            )


def longest(texts: Sequence[str]) -> int:
    """Return the largest number of tokens of a row."""
    return max(int(text.rpartition("=")[2]) for text in texts)


def is_distribution(texts: Sequence[str]) -> bool:
    """Return whether the texts describe rows, and not steps."""
    return any("=" in text for text in texts)


def of_batches(texts: Sequence[str], batch_size: int) -> list[int]:
    """Return the numbers of tokens of the batches of a plan, in the order of its steps.

    Args:
        texts: what was given as `--seq`.
        batch_size: number of rows of a batch.
    """
    if not is_distribution(texts):
        return [int(text) for text in texts]
    points = _points(texts)
    shares = [(i + 0.5) / NUM_STEPS for i in range(NUM_STEPS)]
    # A batch is at most as long as x if all of its rows are.
    found = [_length(points, share ** (1 / batch_size)) for share in shares]
    random.Random(_ORDER).shuffle(found)
    return [*found, longest(texts)]


def _points(texts: Sequence[str]) -> list[tuple[float, int]]:
    """Return percentiles with their lengths, from 0 to 100.

    Raises:
        ValueError: a text is no percentile, or there is no maximum.
    """
    found = {0.0: 0}
    for text in texts:
        match = _PART.fullmatch(text)
        if match is None or not int(match["tokens"]):
            raise ValueError(
                f"{text!r} should be a number of tokens, or of a distribution a "
                "percentile or the maximum: p50=190 p90=310 max=768"
            )
        percent = float(match["percent"] or 100)
        if percent and percent in found:
            raise ValueError(f"{text!r}: the same share of the rows is given twice")
        found[percent] = int(match["tokens"])
    if 100.0 not in found:
        raise ValueError("the largest length is missing: give max=TOKENS")
    return sorted(found.items())


def _length(points: Sequence[tuple[float, int]], share: float) -> int:
    """Return the length that a share of the rows does not exceed."""
    for (low, shorter), (high, longer) in itertools.pairwise(points):
        if 100 * share <= high:
            part = (100 * share - low) / (high - low)
            return max(1, round(shorter + part * (longer - shorter)))
    return points[-1][1]
