"""Common parts of all figures: style, grid of panels, legend, file.

A figure is a grid of panels with one legend next to them, never on them. Cells that
failed are part of the figure: a cross at the upper edge at their position, or a line in
the note below the panels.
"""

import functools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from meft_reports.style import look, method_order
from meft_reports.summary import split
from meft_reports.text import SHORT_LENGTH, short

RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # included in matplotlib: the same on any machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.unicode_minus": True,
    "text.parse_math": False,  # two dollar signs in a name are not a formula
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.fonttype": "path",
    "svg.hashsalt": "meft",  # ids inside an SVG are the same in every run
}

WIDTH_INCHES = 10.0
TITLE_LENGTH = 44
"""Number of characters that fit over one of two panels in a row."""
LEGEND_INCHES = 1.6
"""Width of the legend that leaves the panels wide enough for `TITLE_LENGTH`."""
LOG_RATIO_ACROSS = 16
"""The x axis is logarithmic if its values span more than this factor."""
MAX_FAILURES = 20
"""Number of failed cells that a note below the panels names."""
CELL_ID_LENGTH = 240
"""Number of characters of a cell's name in that note."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def styled(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
    """Run `draw` in the style of this package, without changing matplotlib's settings.

    Names in the frame are shortened to fit into a figure.
    """

    @functools.wraps(draw)
    def in_our_look(frame: pd.DataFrame) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(_with_short_names(frame))

    return in_our_look


def _with_short_names(frame: pd.DataFrame) -> pd.DataFrame:
    lengths = {
        name: CELL_ID_LENGTH if name == "cell_id" else SHORT_LENGTH
        for name in frame.columns
        if frame[name].dtype == "string"
    }
    names = {
        name: frame[name].map(
            functools.partial(short, max_length=length), na_action="ignore"
        )
        for name, length in lengths.items()
        if (frame[name].str.len() > length).any()
    }
    return frame.assign(**names)


def panels(
    num_panels: int, num_columns: int, row_inches: float | Sequence[float] = 2.9
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its panels, row by row, without pyplot.

    Args:
        num_panels: number of panels.
        num_columns: maximum number of panels in a row.
        row_inches: height of a row, or of each row.
    """
    num_columns = min(num_panels, num_columns)
    num_rows = -(-num_panels // num_columns)
    heights = [row_inches] * num_rows if isinstance(row_inches, float) else row_inches
    # One row must be high enough for a legend of every method.
    height = max(3.9, sum(heights))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout=layout)
    FigureCanvasAgg(figure)
    ratios = {"height_ratios": heights}
    grid = (
        figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw=ratios)
        .ravel()
        .tolist()
    )
    for unused in grid[num_panels:]:
        unused.remove()
    return figure, grid[:num_panels]


def set_title(axes: Axes, title: str) -> None:
    """Set the panel's title, broken between its parts if it is too long for a line."""
    lines = [""]
    for part in title.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        lines[-1:] = [longer] if len(longer) <= TITLE_LENGTH else [lines[-1], part]
    axes.set_title("\n".join(filter(None, lines)))


def add_legend(
    figure: Figure, methods: Iterable[str], extra: Sequence[Line2D] = ()
) -> None:
    """Add one entry per method, in a fixed order, next to the panels.

    Args:
        figure: the figure.
        methods: names of methods.
        extra: entries that follow them.
    """
    entries = [method_entry(m) for m in sorted(set(methods), key=method_order)]
    legend = figure.legend(handles=[*entries, *extra], loc="outside right upper")
    # A wide legend makes the figure wider, not the panels narrower than their titles.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is a box
        width = legend.get_window_extent().width / figure.dpi
    figure.set_figwidth(WIDTH_INCHES + max(0.0, width - LEGEND_INCHES))


def add_note(figure: Figure, lines: Iterable[str]) -> None:
    """Add lines of small text below the panels, if there are any."""
    text = "\n".join(textwrap.fill(line, width=150) for line in lines)
    if text:
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="#444444")


def method_entry(method: str) -> Line2D:
    """Return the legend's entry of a method."""
    return Line2D([], [], label=method, **line_style(method))


def line_style(method: str, rank: int = 5) -> dict[str, Any]:
    """Return matplotlib's options for a line of this method.

    Lines that may coincide are numbered by `rank`: later ones have smaller markers, so
    that those below them remain visible.
    """
    its = look(method)
    return {
        "color": its.color,
        "marker": its.marker,
        "linestyle": its.line,
        "markerfacecolor": its.face,
        "markersize": max(3.5, 8.5 - 0.6 * rank),
    }


def shaded_entries(
    lines: Mapping[tuple[str, int], str],
) -> dict[tuple[str, int], Line2D]:
    """Return the legend entry, which has the style, of every line.

    The lines of one method get lighter from the first to the last.

    Args:
        lines: text of each line by its method and number.
    """
    entries = {}
    for method in sorted({method for method, _ in lines}, key=method_order):
        numbers = sorted(number for name, number in lines if name == method)
        style, hollow = line_style(method), look(method).hollow
        colors = shades(style["color"], len(numbers))
        for number, color in zip(numbers, colors, strict=True):
            its = style | {"color": color}
            its |= {} if hollow else {"markerfacecolor": color}
            words = lines[method, number]
            label = f"{method}, {words}" if len(numbers) > 1 else method
            entries[method, number] = Line2D([], [], label=label, **its)
    return entries


def entries_by_k(rows: pd.DataFrame) -> dict[tuple[str, int], Line2D]:
    """Return the style of every method and k in `rows`; k is -1 where there is none."""
    lines = zip(rows["method"], rows["lost_bits"].fillna(-1), strict=True)
    return shaded_entries({(method, int(k)): f"k = {k:.0f}" for method, k in lines})


def style_of(entry: Line2D) -> dict[str, Any]:
    """Return matplotlib's options for the line of a legend's entry."""
    return {
        "color": entry.get_color(),
        "marker": entry.get_marker(),
        "linestyle": entry.get_linestyle(),
        "markerfacecolor": entry.get_markerfacecolor(),
    }


def shades(color: str, count: int) -> list[str]:
    """Return `count` colours from `color` towards white, for lines of one method."""
    rgb = to_rgb(color)
    shares = [0.65 * rank / max(1, count - 1) for rank in range(count)]
    mixed = [[part + (1 - part) * share for part in rgb] for share in shares]
    return [color, *(to_hex((red, green, blue)) for red, green, blue in mixed[1:])]


def mark_off_scale(axes: Axes, x: float, finite: bool, color: str) -> None:
    """Mark a value that a logarithmic scale cannot show, on the edge of the panel.

    A triangle on the lower edge is an exact zero, a star on the upper edge is not
    finite.

    Args:
        axes: the panel.
        x: position on the x axis.
        finite: whether the value is finite, and therefore zero.
        color: colour of the mark.
    """
    y, marker = (0.0, "v") if finite else (1.0, "*")
    edge = axes.get_xaxis_transform()
    axes.plot([x], [y], marker, clip_on=False, transform=edge, color=color)


class PowersOfTen(LogFormatter):
    """Format `10⁻²` as matplotlib's own formatter does, without a formula's markup."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick; empty where matplotlib would omit it."""
        if x <= 0 or not super().__call__(x, pos):
            return ""
        exponent = math.floor(math.log10(x) + 1e-9)
        factor = f"{x / 10.0**exponent:.3g}"
        power = f"10{str(exponent).translate(SUPERSCRIPTS)}"
        return power if factor == "1" else f"{factor} · {power}"


def log_up(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain text labels."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PowersOfTen())
    axes.yaxis.set_minor_formatter(PowersOfTen())


def name_line(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Add small text at the end of a line.

    Args:
        axes: the panel.
        x: position of the end on the x axis.
        y: position of the end on the y axis.
        text: the text, which may be empty.
        color: its colour.
    """
    axes.annotate(
        text,
        (x, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=color,
    )


def tick_at(axes: Axes, positions: Sequence[float]) -> None:
    """Set ticks at measured positions, on a logarithmic scale if they are far apart.

    The margin on either side has room for points next to the outermost ticks.
    """
    low, high = positions[0], positions[-1]
    if low > 0 and high >= LOG_RATIO_ACROSS * low:
        axes.set_xscale("log", base=2)
        room = (high / low) ** 0.08
        axes.set_xlim(low / room, high * room)
    else:
        room = 0.08 * (high - low) or 1
        axes.set_xlim(low - room, high + room)
    axes.set_xticks(positions, [f"{position:g}" for position in positions])
    axes.minorticks_off()


def side_by_side(axes: Axes, position: float, rank: int, count: int) -> float:
    """Return the x position of a point of line `rank` of `count` at `position`.

    Lines are shifted so that no error bar hides another. The offset is relative to the
    range of the x axis, which `tick_at` has set.

    Args:
        axes: the panel.
        position: the measured position.
        rank: index of the line.
        count: number of lines.
    """
    share = 0.006 * (rank - (count - 1) / 2)
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        return float(position * (high / low) ** share)
    return float(position + (high - low) * share)


def failed_entry() -> Line2D:
    """Return the legend's entry of the cross that denotes a failed cell."""
    return Line2D(
        [], [], label="failed cell", color="#444444", marker="x", linestyle=""
    )


def mark_failed(
    axes: Axes, failed: pd.DataFrame, x_column: str, top: float = 0.97
) -> None:
    """Draw a cross with its status at the upper edge for every failed cell.

    Crosses at the same position are stacked downwards; the y axis is extended, so that
    they never cover data.

    Args:
        axes: the panel.
        failed: the failed cells.
        x_column: column with the position on the x axis.
        top: height of the first cross, as a share of the panel.
    """
    if failed.empty:
        return
    heights: dict[float, int] = {}
    for key, cells in split(failed, [x_column, "method", "status"]):
        x, its = float(key[x_column]), look(key["method"])
        y = top - 0.07 * heights.get(x, 0)
        heights[x] = heights.get(x, 0) + 1
        at_edge = axes.get_xaxis_transform()
        name = f"failed/{key['method']}/{key['status']}"
        axes.plot([x], [y], "x", color=its.color, transform=at_edge, gid=name)
        axes.annotate(
            key["status"] + (f" ({len(cells)} cells)" if len(cells) > 1 else ""),
            (x, y),
            xycoords=at_edge,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=its.color,
        )
    add_headroom(axes, 0.07 * max(heights.values()) + 1.01 - top)


def add_headroom(axes: Axes, share: float) -> None:
    """Keep the upper `share` of the panel free of data, on either kind of scale."""
    low, high = axes.get_ylim()
    share = min(share, 0.7)
    if axes.get_yscale() == "log":
        axes.set_ylim(low, low * (high / low) ** (1 / (1 - share)))
    else:
        axes.set_ylim(low, low + (high - low) / (1 - share))


def failures_note(failed: pd.DataFrame) -> list[str]:
    """Return one line that names failed cells, for plots that cannot show them."""
    if failed.empty:
        return []
    names = [
        f"{row.cell_id} ({row.status})"
        for row in failed.head(MAX_FAILURES).itertuples()
    ]
    num_more = len(failed) - len(names)
    names += [f"and {num_more} more"] if num_more else []
    return ["Failed cells, with nothing to draw: " + ", ".join(names)]


def render(figure: Figure, format: str) -> bytes:
    """Return the figure as `png`, `svg` or `pdf`: equal bytes for equal figures."""
    # A date or a version in the file would make equal figures differ.
    metadata: dict[str, dict[str, None]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    buffer = BytesIO()
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # A character that the font lacks is a box, and long names may leave no room for
        # panels.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.savefig(buffer, format=format, dpi=150, metadata=metadata[format])
    return buffer.getvalue()
