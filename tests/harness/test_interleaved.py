"""Interleaved steps of two methods, and where a method starts from."""

import time
from collections.abc import Callable

import pytest
import torch

from meft_bench.child.measuring.starting_point import deviation
from meft_bench.child.meters.interleaved import time_interleaved

Steps = tuple[list[str], Callable[[str, list[float]], Callable[[], None]]]
"""Names in the order they ran in, and what makes a step of a name and its times."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Steps that take given numbers of seconds."""
    now = [0.0]
    order: list[str] = []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def make(name: str, seconds: list[float]) -> Callable[[], None]:
        left = iter(seconds)

        def step() -> None:
            order.append(name)
            now[0] += next(left)

        return step

    return order, make


def test_the_order_within_a_pair_changes(steps: Steps) -> None:
    """Else the one that always follows would pay for what the other leaves behind. Warm
    pairs do not count; the ratio is that of each pair, not of the medians."""
    order, make = steps
    timed = time_interleaved(
        make("own", [9.0, 2.0, 30.0, 4.0]),
        make("reference", [1.0, 1.0, 10.0, 8.0]),
        warmup_pairs=1,
        num_pairs=4,
        device="cpu",
    )
    assert order == [
        "own",
        "reference",
        "reference",
        "own",
        "own",
        "reference",
        "reference",
        "own",
    ]
    assert timed.reference_step_seconds == 8.0
    assert timed.step_ratio == 2.0  # of 2, 3 and 0.5; the medians would give 4 / 8
    assert timed.step_ratio_iqr == 1.25


def test_one_pair_has_no_spread(steps: Steps) -> None:
    """There is none to tell."""
    _, make = steps
    timed = time_interleaved(
        make("own", [3.0]),
        make("reference", [2.0]),
        warmup_pairs=0,
        num_pairs=1,
        device="cpu",
    )
    assert timed.step_ratio == 1.5
    assert timed.step_ratio_iqr is None


def test_deviation_is_relative_to_the_backbone() -> None:
    """A tenth more of everything is a deviation of a tenth; nothing changed is 0."""
    hidden = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert deviation(hidden, hidden) == 0.0
    assert deviation(hidden, 1.1 * hidden) == pytest.approx(0.1)
    assert deviation(2 * hidden, hidden) == 0.5
