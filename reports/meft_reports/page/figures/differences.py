"""Paired differences of scores as a forest plot."""

from meft_reports.page.figures.figure import ZERO, Figure, css, names, quantity, tooltip
from meft_reports.page.pairs import TIE

_COLOR = {
    "field": "verdict",
    "type": "nominal",
    "scale": {
        "domain": ["ahead", "behind", TIE],
        "range": [css("good"), css("bad"), css("muted")],
    },
    "legend": {"title": None, "orient": "bottom"},
}
_SHAPE = {
    **_COLOR,
    "scale": {
        "domain": ["ahead", "behind", TIE],
        "range": ["triangle-right", "triangle-left", "circle"],
    },
}
_X = "difference of scores"

FIGURE = Figure(
    name="differences",
    title="Difference of scores, on the same seeds",
    about="Bars are intervals of 95 % over seeds and evaluated rows together, or over "
    "seeds where rows are not known; pairs without an interval are left out. Colored "
    "only where the test excludes 0 after "
    "Holm's correction; otherwise there is no significant difference.",
    rows="pairs",
    controls=("against",),
    value="difference",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 26},
        "layer": [
            ZERO,
            {
                "mark": {"type": "rule", "strokeWidth": 1.3},
                "encoding": {
                    "y": names(),
                    "x": quantity("low", _X),
                    "x2": {"field": "high"},
                    "color": _COLOR,
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 70,
                    "opacity": 1,
                    "cursor": "pointer",
                },
                "encoding": {
                    "y": names(),
                    "x": quantity("difference", _X),
                    "color": _COLOR,
                    "shape": _SHAPE,
                    "tooltip": tooltip(
                        name="setting",
                        against="less that of",
                        difference="difference|+.3f",
                        low="95 % from|+.3f",
                        high="to|+.3f",
                        num_seeds="seeds",
                        num_rows="rows",
                        p="corrected p|.3f",
                        verdict="verdict",
                    ),
                },
            },
        ],
    },
)
