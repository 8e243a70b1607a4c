import functools
from itertools import pairwise
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

import meft_reports.plots
from marks import slow_but_for
from meft_reports.errors import NothingToDraw, UnknownName
from meft_reports.frame import to_frame
from meft_reports.plots import PLOTS, canvas, find_plot
from meft_reports.plots.canvas import render
from meft_reports.plots.loss_curve import running_mean
from meft_reports.style import LOOKS, look
from reporting.drawn import numbers
from reporting.kinds import Draw, MakeRecord, Record

UNITS = {
    "headline": ("peak GPU memory of a training step (GiB)", ""),
    "longest": ("longest sequence (tokens)", ""),
    "score_memory": ("peak allocated memory (MiB)", "score (accuracy)"),
    "loss_curve": ("step (optimizer updates)", "training loss (mean of 1 steps)"),
    "step_seconds": ("time of a step (full = 1 = 500 ms)", ""),
    "memory_batch": ("batch size (rows)", "saved for backward (MiB)"),
    "memory_depth": ("depth (blocks)", "saved for backward (MiB)"),
    "savings": ("activations of a step (GiB)", ""),
    "reconstruction": ("block (0 is the lowest)", "reconstruction error (relative)"),
    "score_lost_bits": ("lost bits k (the scale is 2^-k)", "score (accuracy)"),
    "score_reversible": ("reversible blocks (lowest of the stack)", "score (accuracy)"),
    "score_top_k": ("neurons kept by a token, K", "score (options)"),
    "score_experts": ("experts of a block", "score (options)"),
    "step_ratio": ("depth (blocks)", "time of a step (reference = 1)"),
    "step_neurons": ("neurons per block", "time of a step (reference = 1)"),
    "traffic_neurons": ("neurons per block", "moved in a step (MiB)"),
    "union_batch": ("tokens of a batch", "share of neurons active"),
    "routing_recall": ("block (0 is the lowest)", "recall of the best neurons"),
    "activation_curve": (
        "neurons by size (share of all)",
        "activation (largest = 1)",
    ),
    "gradient_depth": ("depth (blocks)", "worst gradient error (relative)"),
    "start_deviation": (
        "lost bits k (the scale is 2^-k)",
        "deviation at the start (relative)",
    ),
}
OF_DEPTH = ("step_ratio", "gradient_depth", "start_deviation")
OF_QUALITY = ("score_lost_bits", "score_reversible")
OF_KNOWLEDGE = ("score_top_k", "score_experts")
OF_TRAFFIC = (
    *("step_neurons", "traffic_neurons", "union_batch"),
    *("routing_recall", "activation_curve"),
)
every_plot = pytest.mark.parametrize("name", PLOTS)


@pytest.fixture(scope="module")
def frames(
    frame: pd.DataFrame,
    depth: pd.DataFrame,
    quality: pd.DataFrame,
    traffic: pd.DataFrame,
    knowledge: pd.DataFrame,
    headline: pd.DataFrame,
    longest: pd.DataFrame,
) -> dict[str, pd.DataFrame]:
    """The made-up run of which each plot can be drawn."""
    frames = dict.fromkeys(PLOTS, frame) | dict.fromkeys(OF_DEPTH, depth)
    frames |= dict.fromkeys(OF_QUALITY, quality)
    frames |= dict.fromkeys(OF_KNOWLEDGE, knowledge)
    frames["longest"] = longest
    frames["headline"] = frames["savings"] = headline
    return frames | dict.fromkeys(OF_TRAFFIC, traffic)


@pytest.fixture(scope="module")
def draw(frames: dict[str, pd.DataFrame]) -> Draw:
    """Draw a plot of its made-up run, once for all tests."""
    return functools.cache(lambda name: find_plot(name).draw(frames[name]))


def texts(figure: Figure) -> list[str]:
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_every_file_of_the_folder_is_a_plot_or_a_part_of_one() -> None:
    """A plot that is forgotten in the list would never be shown."""
    folder = Path(meft_reports.plots.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    parts = "__init__ canvas memory_curves neuron_lists ratio_curves score_curves"
    assert files == {*PLOTS, *parts.split()}


WITH_LEGEND = sorted({*PLOTS} - {"longest", "step_seconds"})
"""Bars and lines of the others have the names of methods next to them."""


@every_plot
def test_axes_carry_labels_with_units(draw: Draw, name: str) -> None:
    """A reader need not look elsewhere to know what is drawn, and in what unit."""
    figure = draw(name)
    across, up = UNITS[name]
    assert figure.axes[0].get_xlabel() == across
    assert figure.axes[0].get_ylabel() == up
    for axes in figure.axes:
        assert axes.get_title(loc="left")
        assert axes.get_xlabel()


@pytest.mark.parametrize("name", WITH_LEGEND)
def test_the_legend_does_not_cover_anything(draw: Draw, name: str) -> None:
    """It is next to every panel and title, and inside the figure."""
    figure = draw(name)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    for axes in figure.axes:
        assert not box.overlaps(axes.get_window_extent())
        assert not box.overlaps(axes._left_title.get_window_extent())  # type: ignore[attr-defined]
        assert axes.get_legend() is None
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0


@pytest.mark.slow
@every_plot
def test_equal_frames_give_equal_bytes(
    every_kind: list[Record], frames: dict[str, pd.DataFrame], name: str
) -> None:
    """Whatever the order of the records, and however often it is drawn."""
    cells = set(frames[name]["cell_id"])
    records = [r for r in reversed(every_kind) if r["cell_id"] in cells]
    plot = find_plot(name)
    first = render(plot.draw(frames[name]), "svg")
    again = render(plot.draw(to_frame(records)), "svg")
    assert first == again


@pytest.mark.parametrize("name", slow_but_for(PLOTS, "score_memory", "union_batch"))
def test_drawing_leaves_global_settings_alone(
    frames: dict[str, pd.DataFrame], name: str
) -> None:
    """A notebook that draws one of ours keeps its own look."""
    before = dict(matplotlib.rcParams)
    find_plot(name).draw(frames[name])
    assert dict(matplotlib.rcParams) == before


@every_plot
def test_nothing_to_draw_says_what_is_missing(
    make_record: MakeRecord, name: str
) -> None:
    """An empty panel would say nothing; the reason does."""
    with pytest.raises(NothingToDraw, match=r"^no "):
        find_plot(name).draw(to_frame([make_record("oom"), make_record("oom", seed=1)]))


def test_a_failed_cell_is_a_cross_at_the_upper_edge(draw: Draw) -> None:
    """In both panels of the workload, where its number would have been."""
    for name, places in (("memory_batch", [16]), ("memory_depth", [6, 32])):
        figure = draw(name)
        crosses = [
            line
            for axes in figure.axes
            for line in axes.lines
            if line.get_gid() == "failed/full/oom"
        ]
        found = [int(numbers(line.get_xdata())[0]) for line in crosses]
        assert found == places * 2
        assert texts(figure).count("oom") == len(found)
        assert "failed cell" in texts(figure)


def test_a_failed_cell_never_stands_on_data(draw: Draw) -> None:
    """The panel is made higher, so that all data lies below every cross."""
    figure = draw("memory_batch")
    figure.canvas.draw()
    for axes in figure.axes:
        crosses = [line for line in axes.lines if line.get_gid()]
        curves = [line for line in axes.lines if not line.get_gid()]
        for cross in crosses:
            edge = cross.get_transform().transform(cross.get_xydata())[:, 1].min()
            for curve in curves:
                data = curve.get_transform().transform(curve.get_xydata())
                assert data[:, 1].max() < edge


def test_activations_stand_at_their_bytes_and_failures_at_the_right(
    make_record: MakeRecord,
) -> None:
    """One row per workload, of which one has no number of the exact inverse."""
    records = [
        make_record(
            *([status] if method == "meft1-exact" else []),
            method=method,
            task="synthetic",
            batch_size=size,
            model_state_bytes=2**30,
            peak_allocated_bytes=peak,
        )
        for size, status in ((1, "ok"), (2, "oom"))
        for method, peak in (("full", 5 * 2**30), ("meft1-exact", 3 * 2**30))
    ]
    (axes,) = find_plot("savings").draw(to_frame(records)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "minilm-l6 · fp32 · batch 1",
        "minilm-l6 · fp32 · batch 2",
    ]
    found = [
        (line.get_marker(), *numbers(line.get_xdata()), *numbers(line.get_ydata()))
        for line in axes.lines
    ]
    marks = {method: look(method).marker for method in ("full", "meft1-exact")}
    *known, cross = found
    assert known == [
        (marks["full"], 4, 0),
        (marks["meft1-exact"], 2, 0),
        (marks["full"], 4, 1),
    ]
    assert cross == ("x", 0.985, 1)


def test_the_longest_sequences_are_bars_in_the_order_of_methods(draw: Draw) -> None:
    """As long as the sequence; those that copy activations are hollow."""
    figure = draw("longest")
    (axes,) = figure.axes
    bars = [
        (bar.get_width(), bar.get_facecolor() == (1, 1, 1, 1))
        for bar in axes.patches
        if isinstance(bar, Rectangle)
    ]
    assert bars == [
        (0, False),
        (10_240, False),
        (20_480, True),
        (40_960, True),
    ]
    assert {" does not fit", " 10,240", " 20,480 (320.0 MiB)"} <= {*texts(figure)}


def test_lines_that_name_their_method_need_no_legend(draw: Draw) -> None:
    """Long names of settings would otherwise leave it no room next to the titles."""
    figure = draw("step_seconds")
    assert not figure.legends
    for axes in figure.axes:
        names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
        assert {*names} <= {*LOOKS}


@pytest.mark.parametrize("num_slots", [1, 2])
def test_times_of_cells_that_ran_at_the_same_time_are_marked(
    frames: dict[str, pd.DataFrame], num_slots: int
) -> None:
    """A panel has one number of slots, given in its title, and a note explains."""
    frame = frames["step_seconds"].assign(num_slots=num_slots)
    figure = find_plot("step_seconds").draw(frame)
    is_marked = num_slots > 1
    for axes in figure.axes:
        title = axes.get_title(loc="left").replace("\n", " · ")
        assert ("2 cells at a time" in title) == is_marked
    assert any("under the same load" in t for t in texts(figure)) == is_marked


@pytest.mark.parametrize("name", ["score_memory", "loss_curve", "step_seconds"])
def test_a_failed_cell_without_a_place_is_named(draw: Draw, name: str) -> None:
    """Where no axis could hold it, the note below the panels does."""
    note = " ".join(" ".join(texts(draw(name))).split())
    assert "(error)" in note
    assert "(timeout)" in note


def test_a_method_looks_the_same_everywhere(draw: Draw) -> None:
    """One colour per method, in every legend."""
    for name in WITH_LEGEND:
        (legend,) = draw(name).legends
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if text.get_text() in LOOKS:
                assert isinstance(handle, Line2D)
                assert handle.get_color() == look(text.get_text()).color


def test_no_two_methods_look_alike() -> None:
    """By colour, marker or filling; an unknown method has a look of its own."""
    assert len({(its.color, its.marker, its.hollow) for its in LOOKS.values()}) == len(
        LOOKS
    )
    assert look("new-method") == look("new-method")
    assert look("new-method").color not in {its.color for its in LOOKS.values()}


def test_proportional_growth_is_a_straight_line(draw: Draw) -> None:
    """Both scales of a memory panel are linear, or both are logarithmic."""
    for name in ("memory_batch", "memory_depth"):
        for axes in draw(name).axes:
            assert axes.get_xscale() == axes.get_yscale()


def test_bytes_are_drawn_in_mib(draw: Draw) -> None:
    """meft1 saves 120 MiB at every batch size of the made-up run."""
    axes = draw("memory_batch").axes[0]
    lines = [line for line in axes.lines if line.get_color() == look("meft1").color]
    assert [numbers(line.get_ydata()) for line in lines] == [[120, 120, 120]]


def test_bars_are_the_spread_over_seeds(draw: Draw) -> None:
    """The deviation of 0.90 and 0.92 is 0.02 / sqrt(2), on either side."""
    axes = draw("score_memory").axes[0]
    bars = axes.containers[0]
    assert isinstance(bars, ErrorbarContainer)
    vertical = bars.lines[2][1].get_segments()[0]
    assert vertical[1][1] - vertical[0][1] == pytest.approx(2 * 0.02 / 2**0.5)


def test_values_without_a_place_on_a_log_scale_stand_on_the_edges(
    make_record: MakeRecord,
) -> None:
    """An exact zero is a triangle below, infinity a star above; neither is lost."""
    errors = [float("inf"), 1e-3, 0.0]
    record = make_record(
        method="meft1", reconstruction_error=errors, gradient_error=errors
    )
    axes = find_plot("reconstruction").draw(to_frame([record])).axes[0]
    edge = {line.get_marker(): numbers(line.get_xdata()) for line in axes.lines}
    assert edge["v"] == [2]
    assert edge["*"] == [0]
    assert edge["o"] == [1]


def test_random_weights_are_said_in_titles(make_record: MakeRecord) -> None:
    """A score or curve of random weights never passes for a real one."""
    shape = {"task": "synthetic", "backbone": "random:bert-tiny"}
    frame = to_frame([make_record(**shape, batch_size=size) for size in (2, 4)])
    for axes in find_plot("memory_batch").draw(frame).axes:
        assert "random weights" in axes.get_title(loc="left")


def test_random_input_of_two_heads_is_two_panels(make_record: MakeRecord) -> None:
    """Their titles begin with the task; the curves never meet in one."""
    tasks = ("synthetic", "synthetic-lm")
    frame = to_frame(
        [make_record(task=task, batch_size=size) for task in tasks for size in (2, 4)]
    )
    axes = find_plot("memory_batch").draw(frame).axes
    firsts = [panel.get_title(loc="left").split(" · ")[0] for panel in axes]
    assert firsts == [task for task in tasks for _ in range(2)]


def test_two_machines_are_two_panels(make_record: MakeRecord) -> None:
    """Their curves never meet in one."""
    frame = to_frame(
        [
            make_record(task="synthetic", batch_size=size, machine=machine, seed=seed)
            for seed, machine in enumerate(("Machine A", "Machine B"))
            for size in (2, 4)
        ]
    )
    axes = find_plot("memory_batch").draw(frame).axes
    titles = [a.get_title(loc="left") for a in axes]
    assert sum("Machine A" in title for title in titles) == 2
    assert sum("Machine B" in title for title in titles) == 2


def test_a_running_mean_is_the_mean_of_each_window() -> None:
    """As many values as there are whole windows."""
    assert running_mean([1.0, 2.0, 6.0], 2) == [1.5, 4.0]
    assert running_mean([1.0], 2) == []
    broken = running_mean([1.0, float("inf"), 1.0, 3.0], 2)
    assert [value != value for value in broken] == [True, True, False]


def test_methods_stand_in_the_same_order_in_every_legend(draw: Draw) -> None:
    """The order of the table of looks."""
    order = list(LOOKS)
    for name in WITH_LEGEND:
        (legend,) = draw(name).legends
        shown = [text.get_text() for text in legend.get_texts()]
        positions = [order.index(text) for text in shown if text in order]
        assert all(a < b for a, b in pairwise(positions))


def test_an_unknown_plot_names_the_nearest() -> None:
    """A mistyped name costs one line."""
    with pytest.raises(UnknownName, match="did you mean 'memory_depth'"):
        find_plot("memory-depth")


def test_a_wide_legend_leaves_panels_as_wide_as_their_titles() -> None:
    """Names of methods can be long; then the figure is wider."""
    for num_letters in (4, 30, 60):
        figure, grid = canvas.panels(4, num_columns=2)
        for axes in grid:
            canvas.set_title(axes, " · ".join(["twenty letters long"] * 5))
        canvas.add_legend(figure, ["m" * num_letters, "full"])
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        for axes in grid:
            # matplotlib has no public name for a title on the left.
            title = axes._left_title.get_window_extent()  # type: ignore[attr-defined]
            assert title.x1 < legend.x0
            assert legend.x1 < figure.bbox.x1
