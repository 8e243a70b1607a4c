"""Time of a step divided by that of its reference, timed in turns."""

from meft_reports.page.figures.figure import (
    Figure,
    css,
    methods,
    names,
    quantity,
    tooltip,
)

_X = "multiple of the reference's step"

FIGURE = Figure(
    name="step_ratios",
    title="Time of a step, as a multiple of its reference's",
    about="Steps of both were timed in turns in one process; the point is the median "
    "over the pairs and the bar the range between their quartiles. Left of 1 is faster "
    "than the reference.",
    rows="step_ratios",
    free=("depth",),
    value="step_ratio",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 20},
        "layer": [
            {
                "mark": {"type": "rule", "color": css("soft")},
                "encoding": {"x": {"datum": 1, "type": "quantitative"}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {
                    "y": names(),
                    "x": quantity("from", _X, scale={"zero": False}),
                    "x2": {"field": "to"},
                    "color": methods(False)["color"],
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
                    "x": quantity("step_ratio", _X, scale={"zero": False}),
                    **methods(False),
                    "tooltip": tooltip(
                        name="setting",
                        reference="reference",
                        step_ratio="multiple|.3f",
                        step_ratio_iqr="between quartiles|.3f",
                        num_turns="timed steps",
                        step_seconds="seconds of a step|.3f",
                    ),
                },
            },
        ],
    },
)
