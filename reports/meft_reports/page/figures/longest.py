"""The largest value that fits by each method, one panel for each search by `fit`."""

from meft_reports.page.figures.figure import (
    LEGEND,
    Figure,
    css,
    names,
    quantity,
    tooltip,
)

_KINDS = [
    "MEFT, on the device",
    "MEFT, with host memory",
    "others, on the device",
    "others, with host memory",
]


def _colors(*colors: str) -> dict[str, object]:
    return {
        "field": "kind",
        "type": "nominal",
        "scale": {"domain": _KINDS, "range": [*colors]},
        "legend": LEGEND,
    }


_FILL = _colors(css("accent"), "transparent", css("soft"), "transparent")
_STROKE = _colors(css("accent"), css("accent"), css("soft"), css("soft"))

_X = quantity("share", scale={"domain": [0, 1]}, axis=None)

FIGURE = Figure(
    name="longest",
    title="@what that fits, by method",
    about="The answers of searches, each panel with a scale of its own. Hollow bars "
    "keep activations in host memory. The number of times is against the best method "
    "other than MEFT that is alike in that.",
    rows="longest",
    value="value",
    is_wide=True,
    spec={
        "facet": {
            "field": "panel",
            "type": "nominal",
            "title": None,
            "sort": "@panels",
            "header": {
                "labelFontSize": 12,
                "labelFontWeight": "bold",
                "labelLimit": "@panel_width",
            },
        },
        "columns": "@columns",
        "spec": {
            "width": "@panel_beside_names",
            "height": {"step": 20},
            "layer": [
                {
                    "mark": {"type": "bar", "cursor": "pointer", "strokeWidth": 1.5},
                    "encoding": {
                        "y": names(),
                        "x": _X,
                        "fill": _FILL,
                        "stroke": _STROKE,
                        "tooltip": tooltip(
                            name="setting",
                            text="@x",
                            kind="keeps its tensors",
                            ratio="times the best other method alike|.2f",
                            moved="over the link in a step",
                            link="link at least",
                            compute="arithmetic and memory at least",
                        ),
                    },
                },
                {
                    "mark": {"type": "text", "align": "left", "dx": 6},
                    "encoding": {
                        "y": names(),
                        "x": _X,
                        "text": {"field": "text"},
                    },
                },
            ],
        },
    },
)
