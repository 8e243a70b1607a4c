"""Score against peak memory, with intervals and the front of the means."""

from meft_reports.page.figures.figure import Figure, css, methods, quantity, tooltip

_X = quantity(
    "peak",
    "peak allocated (@unit)",
    scale={"zero": False, "padding": 18},
    axis={"tickCount": "@ticks"},
)
_Y = quantity("score", "score", scale={"zero": False, "padding": 18})

FIGURE = Figure(
    name="scores",
    title="Score against peak memory",
    about="Up and to the left is better. Bars are intervals of 95 % of the mean over "
    "seeds and, where they are known, evaluated rows; settings of one seed have none. "
    "The line joins what no other setting beats in both, by means: neighbours on it "
    "may be ties.",
    rows="scores",
    scaled={"peak": "peak_allocated_bytes"},
    controls=("labels",),
    value="score",
    spec={
        "width": "@width",
        "height": "@height",
        "layer": [
            {
                "transform": [{"filter": "datum.is_front"}],
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "color": css("soft"),
                },
                "encoding": {"x": _X, "y": _Y},
            },
            {
                "needs": "score_low",
                "transform": [{"filter": "isValid(datum.score_low)"}],
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6},
                "encoding": {
                    "x": _X,
                    "y": quantity("score_low", "score"),
                    "y2": {"field": "score_high"},
                    "color": methods()["color"],
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 90,
                    "opacity": 1,
                    "cursor": "pointer",
                },
                "encoding": {
                    "x": _X,
                    "y": _Y,
                    **methods(),
                    "tooltip": tooltip(
                        name="setting",
                        score="score|.3f",
                        score_low="95 % from|.3f",
                        score_high="to|.3f",
                        majority_score="most frequent answer|.3f",
                        seeds="seeds",
                        score_rows="rows of the interval",
                        peak="peak, @unit|.3f",
                    ),
                },
            },
            {
                "name": "labels",
                "data": {"name": "labels"},
                "mark": {"type": "text", "align": "left", "dx": 9, "dy": -8},
                "encoding": {"x": _X, "y": _Y, "text": {"field": "name"}},
            },
        ],
    },
)
