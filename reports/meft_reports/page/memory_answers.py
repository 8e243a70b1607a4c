"""Sentences on memory: what an exact method saves, what fits, what a block costs."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from meft_reports.format import format_bytes
from meft_reports.methods import REFERENCE, is_exact, is_stored
from meft_reports.page.cells import is_of_trial, is_predicted
from meft_reports.page.settings import Setting
from meft_reports.page.workloads import in_words
from meft_reports.summary import WORKLOAD
from meft_reports.text import plural

ACTIVATIONS = "peak_activation_bytes"
LEAST_POINTS = 3
"""Number of depths or batch sizes from which on a slope is said."""


def headline(settings: Sequence[Setting]) -> list[Markup]:
    """Say what the best exact method saves: on the largest workload, and over all."""
    workloads = _by_workload(settings)
    against_full = _savings(workloads, "full")
    found = []
    if against_full:
        best, full, share = max(
            against_full,
            key=lambda s: (
                not s[0].has(is_predicted),
                _number(s[1], "model_state_bytes"),
                s[2],
            ),
        )
        need = "would need" if best.has(is_predicted) else "needs"
        found.append(
            Markup(
                "On <b>{}</b>, exact MEFT ({}) {} <b>{}</b> of activations where full "
                "fine-tuning {} {}: <b>{} less</b>."
            ).format(
                best.workload.title,
                _chosen(best, workloads[best.workload.index]),
                need,
                format_bytes(best.numbers[ACTIVATIONS]),
                need,
                format_bytes(full.numbers[ACTIVATIONS]),
                _percent(share),
            )
        )
    against_checkpointing = _savings(workloads, REFERENCE)
    parts = [
        Markup("{} than <code>{}</code> in {}").format(
            _range([share for _, _, share in savings]),
            other,
            plural(len(savings), "workload"),
        )
        for other, savings in (
            ("full", against_full),
            (REFERENCE, against_checkpointing),
        )
        if len(savings) > 1
    ]
    if parts:
        text = Markup("; ").join(parts)
        found.append(
            Markup(
                "Over all workloads, activations of the best exact method take {}."
            ).format(text)
        )
    return found


def fits(settings: Sequence[Setting]) -> list[Markup]:
    """Say where full fine-tuning does not fit, and which methods do."""
    found = []
    for its in _by_workload(settings).values():
        full = [s for s in its if s.method == "full" and s.status == "oom"]
        exact = [s for s in its if _is_exact(s) and s.ok]
        if full and exact:
            best = min(exact, key=lambda s: _number(s, "peak_allocated_bytes"))
            found.append((best, full[0]))
    if not found:
        return []
    best, full_one = max(found, key=lambda f: _number(f[0], "model_state_bytes"))
    size = full_one.least_bytes
    more = f"more than {format_bytes(size)}" if size else "more than there is"
    return [
        Markup(
            "In <b>{}</b> full fine-tuning does not fit and an exact method does, for "
            "example on {}: <code>{}</code> {} {}, <code>full</code> {}."
        ).format(
            plural(len(found), "workload"),
            best.workload.title,
            best.method,
            "would need" if best.has(is_predicted) else "needs",
            format_bytes(best.numbers["peak_allocated_bytes"]),
            more,
        )
    ]


def slopes(settings: Sequence[Setting]) -> list[Markup]:
    """Say what each further block, or row of a batch, adds to the activations."""
    found = []
    for axis, unit in (("depth", "block"), ("batch_size", "row of a batch")):
        lines = _lines(settings, axis)
        if not lines:
            continue
        fields, its = max(lines, key=lambda line: sum(len(v) for v in line[1].values()))
        slope = {
            method: (points[max(points)] - points[min(points)])
            / (max(points) - min(points))
            for method, points in its.items()
        }
        exact = [m for m in slope if is_exact(m) and not is_stored(m)]
        ours = min(exact, key=lambda method: slope[method])
        others = sorted((m for m in slope if m != ours), key=lambda m: slope[m])
        texts = [
            Markup("<code>{}</code> {}{}").format(
                method,
                format_bytes(slope[method]),
                f" ({slope[method] / slope[ours]:.1f}×)"  # noqa: RUF001
                if slope[ours] > 0
                else "",
            )
            for method in others[:5]
        ]
        found.append(
            Markup(
                "Each further {} adds <b>{}</b> to <code>{}</code>; {} ({})."
            ).format(
                unit,
                format_bytes(slope[ours]),
                ours,
                Markup(", ").join(texts) or "nothing else was measured there",
                in_words({**fields, axis: fields[axis]}),
            )
        )
    return found


def _by_workload(settings: Iterable[Setting]) -> dict[int, list[Setting]]:
    """Return settings by workload, without trials, whose bytes are those of results."""
    found: dict[int, list[Setting]] = {}
    for setting in settings:
        if not setting.cells[0]["reference"] and not setting.has(is_of_trial):
            found.setdefault(setting.workload.index, []).append(setting)
    return found


def _savings(
    workloads: dict[int, list[Setting]], other: str
) -> list[tuple[Setting, Setting, float]]:
    """Return the best exact setting, the other one, and what is saved, by workload.

    A workload counts once where several devices give the same bytes.
    """
    found: dict[Any, tuple[Setting, Setting, float]] = {}
    for its in workloads.values():
        exact = [s for s in its if _is_exact(s) and s.numbers[ACTIVATIONS] is not None]
        others = [
            s for s in its if s.method == other and (s.numbers[ACTIVATIONS] or 0) > 0
        ]
        if not exact or not others:
            continue
        best = min(exact, key=lambda s: _number(s, ACTIVATIONS))
        rival = min(others, key=lambda s: _number(s, ACTIVATIONS))
        mine, its_bytes = _number(best, ACTIVATIONS), _number(rival, ACTIVATIONS)
        fields = best.workload.fields
        same = tuple(fields[name] for name in WORKLOAD if name != "device")
        found[same, mine, its_bytes] = best, rival, 1 - mine / its_bytes
    return list(found.values())


def _lines(
    settings: Sequence[Setting], axis: str
) -> list[tuple[dict[str, Any], dict[str, dict[float, float]]]]:
    """Return activations by method and value of `axis`, one entry per other fields."""
    found: dict[Any, tuple[dict[str, Any], dict[str, dict[float, float]]]] = {}
    for setting in settings:
        number, fields = setting.numbers[ACTIVATIONS], setting.workload.fields
        if number is None or not fields[axis] or setting.cells[0]["reference"]:
            continue
        key = tuple(value for name, value in fields.items() if name != axis)
        _, methods = found.setdefault(key, (fields, {}))
        points = methods.setdefault(setting.method, {})
        points[fields[axis]] = min(number, points.get(fields[axis], number))
    result = []
    for fields, methods in found.values():
        long = {m: points for m, points in methods.items() if len(points) > 2}
        if any(is_exact(m) and not is_stored(m) for m in long):
            result.append((fields, long))
    return result


def _is_exact(setting: Setting) -> bool:
    return is_exact(setting.method) and not is_stored(setting.method)


def _chosen(best: Setting, its: Sequence[Setting]) -> Markup:
    """Return the name of the best setting, and of how many it is the best."""
    number = sum(_is_exact(s) and s.numbers[ACTIVATIONS] is not None for s in its)
    text = Markup("<code>{}</code>").format(best.name)
    return text + f", the best of {number}" if number > 1 else text


def _number(setting: Setting, name: str) -> float:
    return setting.numbers[name] or 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _range(shares: Sequence[float]) -> Markup:
    """Return shares that are saved, in words; a negative one is more, not less."""
    least, most, median = min(shares), max(shares), statistics.median(shares)
    if _percent(least) == _percent(most):
        return Markup("<b>{}</b>").format(_less(least))
    if least < 0:
        return Markup("from <b>{}</b> to <b>{}</b> (median {})").format(
            _less(least), _less(most), _less(median)
        )
    return Markup("<b>{:.0f}–{} less</b> (median {})").format(  # noqa: RUF001
        100 * least, _percent(most), _percent(median)
    )


def _less(share: float) -> str:
    return f"{_percent(abs(share))} {'more' if share < 0 else 'less'}"
