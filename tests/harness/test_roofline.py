"""The least time of a step, by what it computes and copies."""

import dataclasses
from collections import Counter

import pytest

from meft_bench.virtual.device import gpu
from meft_bench.virtual.prediction.roofline import PhaseSeconds, roofline

GPU = dataclasses.replace(
    gpu.find("H100"), memory_bytes_per_second=1000.0, link_bytes_per_second=10.0
)


def test_a_phase_takes_as_long_as_what_takes_longest() -> None:
    """Worked by hand; what is recomputed belongs to the backward."""
    found = roofline(
        GPU,
        100.0,
        Counter({"forward": 100, "recompute": 100, "backward": 200}),
        Counter({"forward": 500, "backward": 5000, "update": 3000, "inputs": 1}),
        Counter({("h2d", "forward"): 20, ("d2h", "backward"): 10, ("h2d", ""): 5}),
    )
    assert [each.phase for each in found] == ["forward", "backward", "update"]
    assert [each.seconds for each in found] == pytest.approx([2.5, 5, 3])
    assert [each.bound for each in found] == ["the link to the GPU", "memory", "memory"]
    assert found[1].arithmetic == 3
    assert found[1].to_host == 1
    assert found[0].memory == pytest.approx(0.501)


def test_both_directions_of_the_link_work_at_a_time() -> None:
    copied = Counter({("h2d", "backward"): 30, ("d2h", "backward"): 40})
    found = roofline(GPU, 1.0, Counter(), Counter(), copied)
    assert found[1].seconds == 4
    assert found[1].bound == "the link to the host"


def test_the_host_takes_time_where_its_rate_is_known() -> None:
    def found(rate: float | None) -> PhaseSeconds:
        on = dataclasses.replace(GPU, host_bytes_per_second=rate)
        none = Counter[str]()
        return roofline(on, 1.0, none, none, Counter(), Counter({"update": 50}))[2]

    assert found(5.0).seconds == 10
    assert found(5.0).bound == "the memory of the host"
    assert found(None).seconds == 0
