"""A number along an axis: memory along depth, scores along k, errors along blocks."""

from meft_reports.page.figures.figure import (
    Figure,
    dashes,
    methods,
    quantity,
    tooltip,
)

_X = quantity(
    "x", "@x", scale={"type": "@scale", "zero": "@zero"}, axis={"tickCount": 5}
) | {"type": "@x_type"}
_Y = quantity(
    "y",
    "@y",
    scale={"type": "@y_scale", "zero": "@zero"},
    axis={"tickCount": 6, "format": "@y_format"},
)

FIGURE = Figure(
    name="curves",
    title="@y along @x",
    about="One line per method, options and set of seeds. Both scales are linear or "
    "both logarithmic, so proportional growth is a straight line; errors are always on "
    "a logarithmic scale, with exact zeros as triangles on the lower edge.",
    rows="curves",
    controls=("x", "y", "panel", "scale"),
    value="y",
    spec={
        "facet": {
            "field": "panel",
            "type": "nominal",
            "title": None,
            "sort": "@panels",
            "header": {"labelFontSize": 12, "labelFontWeight": "bold"},
        },
        "columns": "@columns",
        "spec": {
            "width": "@panel_width",
            "height": "@panel_height",
            "layer": [
                {
                    "needs": "low",
                    "transform": [{"filter": "isValid(datum.low)"}],
                    "mark": {"type": "rule", "opacity": 0.5},
                    "encoding": {
                        "x": _X,
                        "y": quantity("low", "@y"),
                        "y2": {"field": "high"},
                        "color": methods()["color"],
                    },
                },
                {
                    "mark": {"type": "line", "strokeWidth": 1.8},
                    "encoding": {
                        "x": _X,
                        "y": _Y,
                        "detail": {"field": "line"},
                        "color": methods()["color"],
                        "strokeDash": dashes(),
                    },
                },
                {
                    "mark": {
                        "type": "point",
                        "filled": True,
                        "size": 55,
                        "opacity": 1,
                        "cursor": "pointer",
                    },
                    "encoding": {
                        "x": _X,
                        "y": _Y,
                        **methods(),
                        "tooltip": tooltip(
                            line="line", x="@x", text="@y", seeds="seeds"
                        ),
                    },
                },
            ],
        },
        "resolve": {"scale": {"y": "@resolve"}},
    },
)
