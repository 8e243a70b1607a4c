"""Sentences on steps: their time against a reference, and rebuilt against stored."""

import statistics
from collections.abc import Sequence

from markupsafe import Markup

from meft_reports.methods import is_meft, is_stored, rebuilt
from meft_reports.page.cells import Cell
from meft_reports.page.pairs import MUST_AGREE
from meft_reports.page.settings import Setting
from meft_reports.page.workloads import key_of
from meft_reports.text import plural

_MAY_DIFFER = ("reversible_blocks", "mlp_chunks")


def steps(settings: Sequence[Setting]) -> list[Markup]:
    """Say how long a step is against that of the reference, timed interleaved."""
    ratios: dict[str, list[tuple[str, float]]] = {}
    for setting in settings:
        ratio, reference = setting.numbers["step_ratio"], setting.cells[0]["reference"]
        if ratio is not None and reference:
            ratios.setdefault(reference, []).append((setting.method, ratio))
    found = []
    for reference, its in sorted(ratios.items()):
        by_method: dict[str, list[float]] = {}
        for method, ratio in its:
            by_method.setdefault(method, []).append(ratio)
        texts = [
            Markup("<code>{}</code> <b>{}</b> in {}").format(
                method, _range(values), plural(len(values), "setting")
            )
            for method, values in by_method.items()
        ]
        found.append(
            Markup(
                "A step takes this multiple of the time of <code>{}</code>, both timed "
                "in turns: {}."
            ).format(reference, Markup("; ").join(texts))
        )
    return found


def twins(settings: Sequence[Setting]) -> list[Markup]:
    """Say in how many steps a rebuilt method has the losses of its stored twin."""
    cells = [cell for setting in settings for cell in setting.ok]
    stored = {_twin_key(c): c for c in cells if is_stored(c["method"])}
    counts: dict[str, list[int]] = {}
    for cell in cells:
        twin = stored.get(_twin_key(cell))
        if twin is None or is_stored(cell["method"]) or not is_meft(cell["method"]):
            continue
        mine, its = cell["loss_curve"], twin["loss_curve"]
        if not mine or not its:
            continue
        same = sum(a == b for a, b in zip(mine, its, strict=False))
        so_far = counts.setdefault(cell["method"], [0, 0, 0])
        so_far[0] += same
        so_far[1] += max(len(mine), len(its))
        so_far[2] += 1
    if not counts:
        return []
    texts = [
        Markup("<code>{}</code> <b>{} of {}</b> steps of {}").format(
            method, f"{same:,}", f"{steps:,}", plural(runs, "run")
        )
        for method, (same, steps, runs) in counts.items()
    ]
    return [
        Markup(
            "The training loss equals that of the stored twin in every digit: {}."
        ).format(Markup("; ").join(texts))
    ]


def _twin_key(cell: Cell) -> tuple[object, ...]:
    names = [*MUST_AGREE, "bottleneck_size", "lost_bits", "learning_rate"]
    options = [cell[name] for name in names if name not in _MAY_DIFFER]
    return (rebuilt(cell["method"]), cell["seed"], key_of(cell), *options)


def _range(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    if f"{least:.2f}" == f"{most:.2f}":
        return f"{least:.2f}"
    median = statistics.median(values)
    return f"{least:.2f}–{most:.2f} (median {median:.2f})"  # noqa: RUF001
