"""Peak memory of a step: what rests between steps, and what a step adds."""

from meft_reports.page.figures.figure import Figure, css, names, quantity, tooltip

_X = "@unit"
_PARTS = ["between steps", "added by a step"]
_TOOLTIP = tooltip(
    name="setting",
    peak="peak, @unit|.3f",
    resting="between steps, @unit|.3f",
    activations="added by a step, @unit|.3f",
    saved="saved for backward, @unit|.3f",
    status="status",
    seeds="seeds",
)

FIGURE = Figure(
    name="memory",
    title="Peak memory of one step",
    about="Between steps there are weights and optimizer state; a step adds "
    "activations and gradients. The tick marks what autograd saves for the backward "
    "pass. A dashed bar ran out of memory: the step needs more than the bar is long. "
    "An empty bar is a peak of which no parts are known.",
    rows="memory",
    scaled={
        "peak": "peak_allocated_bytes",
        "resting": "model_state_bytes",
        "activations": "peak_activation_bytes",
        "saved": "saved_bytes",
        "least": "least_bytes",
    },
    value="peak",
    spec={
        "width": "@width_beside_names",
        "height": {"step": 20},
        "layer": [
            {
                # Where it is not known of what a peak consists, as of `fit`.
                "needs": "peak",
                "transform": [{"filter": "isValid(datum.peak)"}],
                "mark": {
                    "type": "bar",
                    "fill": "transparent",
                    "stroke": css("bar2"),
                    "cursor": "pointer",
                },
                "encoding": {
                    "y": names(),
                    "x": quantity("peak", _X),
                    "tooltip": _TOOLTIP,
                },
            },
            {
                "needs": "resting",
                "transform": [
                    {"filter": "isValid(datum.peak) && isValid(datum.resting)"},
                    {"fold": ["resting", "activations"], "as": ["part", "size"]},
                    {
                        "calculate": f"datum.part == 'resting' ? '{_PARTS[0]}' : "
                        f"'{_PARTS[1]}'",
                        "as": "part",
                    },
                ],
                "mark": {"type": "bar", "cursor": "pointer"},
                "encoding": {
                    "y": names(),
                    "x": quantity("size", _X, stack=True),
                    "order": {"field": "part", "sort": "descending"},
                    "color": {
                        "field": "part",
                        "type": "nominal",
                        "scale": {
                            "domain": _PARTS,
                            "range": [css("bar1"), css("bar2")],
                        },
                        "legend": {
                            "title": None,
                            "orient": "top",
                            "direction": "@direction",
                            "labelLimit": 300,
                        },
                    },
                    "tooltip": _TOOLTIP,
                },
            },
            {
                "needs": "least",
                "transform": [{"filter": "datum.status == 'oom'"}],
                "mark": {
                    "type": "bar",
                    "fill": "transparent",
                    "stroke": css("soft"),
                    "strokeDash": [4, 3],
                    "cursor": "pointer",
                },
                "encoding": {
                    "y": names(),
                    "x": quantity("least", _X),
                    "tooltip": tooltip(name="setting", text="needs"),
                },
            },
            {
                "needs": "saved",
                "transform": [
                    {"filter": "isValid(datum.saved) && isValid(datum.peak)"},
                    {"calculate": "datum.resting + datum.saved", "as": "kept"},
                ],
                "mark": {"type": "tick", "thickness": 2, "color": css("fg")},
                "encoding": {"y": names(), "x": quantity("kept", _X)},
            },
            {
                "transform": [
                    {
                        "calculate": "isValid(datum.peak) ? datum.peak : "
                        "isValid(datum.least) ? datum.least : 0",
                        "as": "end",
                    }
                ],
                "mark": {"type": "text", "align": "left", "dx": 6},
                "encoding": {
                    "y": names(),
                    "x": quantity("end", _X),
                    "text": {"field": "text"},
                },
            },
        ],
    },
)
