"""Numbers of each block: errors of the rebuilt backward, traffic, routing."""

from meft_reports.page.figures.figure import (
    Figure,
    dashes,
    methods,
    quantity,
    tooltip,
)

_Y = quantity(
    "y",
    "@y",
    scale={"type": "@y_scale", "zero": "@zero"},
    axis={"format": "@y_format", "tickCount": 6},
)

_X = quantity("x", "block", axis={"tickMinStep": 1, "format": "d"})

FIGURE = Figure(
    name="blocks",
    title="@y, block by block",
    about="One line per setting, of its first seed; the lowest block is 1. Errors are "
    "relative, on a logarithmic scale; exact zeros are on its lower edge, and what is "
    "not finite is left out and named below.",
    rows="blocks",
    controls=("by_block",),
    value="y",
    spec={
        "width": "@width",
        "height": "@panel_height",
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {
                    "x": _X,
                    "y": _Y,
                    "detail": {"field": "name"},
                    "color": methods()["color"],
                    "strokeDash": dashes(),
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 30,
                    "opacity": 1,
                    "cursor": "pointer",
                },
                "encoding": {
                    "x": _X,
                    "y": _Y,
                    **methods(),
                    "tooltip": tooltip(name="setting", x="block", text="@y"),
                },
            },
        ],
    },
)
