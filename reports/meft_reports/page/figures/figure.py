"""`Figure`: what a figure is, and parts of specifications that figures share.

Words that the page fills in:

    @width, @panel_width, @columns       sizes, by the width of the window
    @methods, @colors, @shapes, @dashes  the methods among the rows, and their looks
    @unit                                the unit of `scaled` numbers, such as GiB
    @x, @y                               titles of the columns that the reader chose
    @scale                               `linear` or `log`

A layer with `needs` is left out where no row has a number in that field.
"""

from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One kind of figure."""

    name: str
    title: str
    about: str
    """What it shows and how to read it, in a sentence or two."""
    rows: str
    """How the page makes rows of the chosen settings: a function of `js/rows.js`."""
    spec: Spec
    free: tuple[str, ...] = ()
    """Fields of the workload that the figure spans, whatever the selectors say."""
    scaled: dict[str, str] = field(default_factory=dict)
    """New fields in `@unit`, each with the field of bytes that it is made from."""
    controls: tuple[str, ...] = ()
    """Selectors of the figure itself: `against`, `x`, `y`, `panel`, `scale`, ..."""
    value: str = ""
    """Field of the number that the figure's text says the extremes of."""
    is_wide: bool = False
    """Whether it takes the whole width of a page of two columns."""


def css(name: str) -> str:
    """Return the color `name` of the style sheet, which has one for each scheme."""
    return f"var(--{name})"


LEGEND = {"title": None, "orient": "bottom", "columns": "@legend_columns"}
"""A legend below the figure; channels of one field share it."""


def methods(legend: bool = True) -> dict[str, Any]:
    """Return the channels that tell methods apart: color and shape, with one legend."""
    place = LEGEND
    return {
        "color": {
            "field": "method",
            "type": "nominal",
            "scale": {"domain": "@methods", "range": "@colors"},
            "legend": place if legend else None,
        },
        "shape": {
            "field": "method",
            "type": "nominal",
            "scale": {"domain": "@methods", "range": "@shapes"},
            "legend": place if legend else None,
        },
    }


def dashes() -> dict[str, Any]:
    """Return the channel that draws stored twins and exact methods differently."""
    return {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": "@methods", "range": "@dashes"},
        "legend": LEGEND,
    }


def quantity(name: str, title: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the channel of a number."""
    return {"field": name, "type": "quantitative", "title": title, **more}


def names(width: int = 230) -> dict[str, Any]:
    """Return a vertical axis of the names of settings, in the order of `order`."""
    return {
        "field": "name",
        "type": "nominal",
        "title": None,
        "sort": {"field": "order", "op": "min"},
        "axis": {"labelLimit": "@label_width", "ticks": False, "domain": False},
    }


def tooltip(**fields: str) -> list[dict[str, Any]]:
    """Return what hovering shows: fields with their titles, `_` for a space."""
    return [
        {"field": name, "title": title, **({"format": form} if form else {})}
        for name, (title, _, form) in (
            (name, text.partition("|")) for name, text in fields.items()
        )
    ]


ZERO = {
    "mark": {"type": "rule", "color": css("soft")},
    "encoding": {"x": {"datum": 0, "type": "quantitative"}},
}
"""A vertical line at 0."""
