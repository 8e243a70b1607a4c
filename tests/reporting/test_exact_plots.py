import math

import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from meft_reports.errors import NothingDeclared, NothingToDraw
from meft_reports.frame import to_frame
from meft_reports.plots import find_plot
from meft_reports.style import look
from reporting.drawn import curves, horizontal, legend, numbers
from reporting.kinds import MakeRecord


def test_score_against_k_is_held_against_full_floats_and_majority(
    quality: pd.DataFrame,
) -> None:
    """Means of two seeds, which differ by 0.02; full and the float method are lines."""
    figure = find_plot("score_lost_bits").draw(quality)
    (axes,) = figure.axes
    lines = curves(axes, look("meft1-exact").color)
    assert len(lines) == 2  # rebuilt and stored
    for across, up in lines:
        assert across == [2, 4]
        assert up == pytest.approx([0.83, 0.85])
    assert horizontal(axes, look("full").color) == pytest.approx([0.91])
    assert horizontal(axes, look("meft1").color) == pytest.approx([0.81])
    assert horizontal(axes, "#888888") == [0.7]
    assert legend(figure)[-1] == "majority class"
    bars = axes.containers[0]
    assert isinstance(bars, ErrorbarContainer)
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.02 / 2**0.5)


def test_the_plain_twin_stands_at_no_rebuilt_block(quality: pd.DataFrame) -> None:
    """0 in a cell asks for all six; a stored twin has none. k=2 did not vary it."""
    (axes,) = find_plot("score_reversible").draw(quality).axes
    floats = curves(axes, look("meft1").color)
    exact = curves(axes, look("meft1-exact").color)
    assert floats == [([0, 2, 6], pytest.approx([0.83, 0.81, 0.81]))]
    assert exact == [([0, 2, 6], pytest.approx([0.85, 0.85, 0.85]))]


@pytest.mark.parametrize(
    ("name", "option"),
    [("score_lost_bits", "lost_bits"), ("score_reversible", "reversible_blocks")],
)
def test_one_value_makes_no_curve(
    make_record: MakeRecord, name: str, option: str
) -> None:
    """Nor do two values of which only one has a score; the page tells these apart."""
    one = [make_record(method=m) for m in ("meft1-exact", "meft1-exact-store")]
    with pytest.raises(NothingDeclared):
        find_plot(name).draw(to_frame(one))
    failed = make_record("oom", method="meft1-exact", **{option: 3})
    with pytest.raises(NothingToDraw) as reason:
        find_plot(name).draw(to_frame([*one, failed]))
    assert not isinstance(reason.value, NothingDeclared)


def test_an_exact_inverse_stands_on_the_edge_at_every_depth(
    depth: pd.DataFrame,
) -> None:
    """A triangle per depth, while the float method climbs; the failed cell a cross."""
    figure = find_plot("gradient_depth").draw(depth)
    for axes in figure.axes:
        edge = [line for line in axes.lines if line.get_marker() == "v"]
        assert sorted(numbers(line.get_xdata())[0] for line in edge) == [6, 12]
        assert all(numbers(line.get_ydata()) == [0.0] for line in edge)
        (climb,) = [c for c in curves(axes, look("meft1").color) if c[0]]
        assert climb == ([6, 12], pytest.approx([6e-3, 12e-3]))
    assert "failed cell" in legend(figure)


def test_the_worst_of_a_depth_may_be_without_bounds(make_record: MakeRecord) -> None:
    """A star on the upper edge, though another block's error is small."""
    records = [
        make_record(method="meft1", depth=d, num_blocks=d, gradient_error=[1e-3, last])
        for d, last in ((6, 1e-2), (12, math.nan))
    ]
    (axes,) = find_plot("gradient_depth").draw(to_frame(records)).axes
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [numbers(line.get_xdata()) for line in stars] == [[12]]


def test_step_ratios_are_drawn_by_method_and_k_around_one(
    depth: pd.DataFrame,
) -> None:
    """Bars are as long as the distance of the quartiles."""
    figure = find_plot("step_ratio").draw(depth)
    assert legend(figure) == [
        "meft1-exact, k = 2",
        "meft1-exact, k = 4",
        "adapters-checkpointing = 1",
        "failed cell",
    ]
    for axes in figure.axes:
        assert horizontal(axes, "#888888") == [1]
        first, second = axes.containers
        for bars, ratio in ((first, 1.2), (second, 1.4)):
            assert isinstance(bars, ErrorbarContainer)
            assert numbers(bars.lines[0].get_ydata()) == [ratio, ratio]
            low, high = bars.lines[2][0].get_segments()[0][:, 1]
            assert high - low == pytest.approx(0.1)


def test_deviation_falls_along_k_and_the_papers_is_a_line(
    quality: pd.DataFrame,
) -> None:
    """One line for a method and its twin, which are the same function."""
    (axes,) = find_plot("start_deviation").draw(quality).axes
    assert axes.get_yscale() == "log"
    exact = curves(axes, look("meft1-exact").color)
    assert exact == [([2, 4], [2.0**-2, 2.0**-4])]
    assert horizontal(axes, look("meft1").color) == [0.25]


def test_only_the_deepest_of_a_workload_is_drawn_block_by_block(
    depth: pd.DataFrame,
) -> None:
    """Two panels for each dtype of the weights, of 12 blocks."""
    figure = find_plot("reconstruction").draw(depth)
    assert len(figure.axes) == 4
    assert all(axes.get_xlim() == (-0.5, 11.5) for axes in figure.axes)


def test_long_titles_are_broken_between_their_parts(make_record: MakeRecord) -> None:
    """And nothing of them is lost."""
    records = [
        make_record(
            task="synthetic", batch_size=size, attention=kernel, dtype="bf16", seq_len=n
        )
        for size in (2, 4)
        for kernel, n in (("sdpa-efficient", 64), ("sdpa-flash", 128))
    ]
    axes = find_plot("memory_batch").draw(to_frame(records)).axes[0]
    title = axes.get_title(loc="left")
    assert all(len(line) <= 44 for line in title.split("\n"))
    assert set(title.replace("\n", " · ").split(" · ")) == {
        "synthetic",
        "minilm-l6",
        "bf16",
        "64 tokens",
        "sdpa-efficient attention",
    }
