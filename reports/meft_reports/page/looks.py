"""Colors, symbols and dashes of methods on the page, for light and dark.

Figures name colors by variables of CSS, so that the same figure
is readable in light, in dark, and on paper.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from meft_reports.page.figures.figure import css
from meft_reports.style import look, method_order

PREFIX = "m"
"""The variables of methods are this and their number."""
_SHAPES = {
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "s": "square",
    "D": "diamond",
    "d": "diamond",
    "X": "cross",
    "P": "cross",
}
"""Symbols of Vega for markers of matplotlib; others are circles."""
_DASHES = {"-": [1, 0], "--": [6, 3], ":": [2, 2], "-.": [6, 2, 2, 2]}
_DARK = 95
"""Colors that are darker than this are lightened on a dark page."""


def looks_of(methods: Iterable[str]) -> list[dict[str, Any]]:
    """Return name, color, shape and dash of every method, in the order of methods."""
    return [
        {
            "name": method,
            "color": css(f"{PREFIX}{index}"),
            "shape": _SHAPES.get(look(method).marker, "circle"),
            "dash": _DASHES[look(method).line],
        }
        for index, method in enumerate(ordered(methods))
    ]


def ordered(methods: Iterable[str]) -> list[str]:
    """Return each method once, in the order in which methods are shown."""
    return sorted(set(methods), key=method_order)


def variables(methods: Sequence[str], dark: bool) -> str:
    """Return the declarations of the methods' colors."""
    colors = [look(method).color for method in methods]
    shown = [_lightened(color) if dark else color for color in colors]
    return "".join(f"--{PREFIX}{index}:{color};" for index, color in enumerate(shown))


def _lightened(color: str) -> str:
    parts = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    red, green, blue = parts
    if 0.3 * red + 0.59 * green + 0.11 * blue > _DARK:
        return color
    return "#" + "".join(f"{round(part + (255 - part) * 0.5):02x}" for part in parts)
