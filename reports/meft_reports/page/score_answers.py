"""Sentences on scores: what is best, what ties with it, what is best at a memory."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from meft_reports.format import format_bytes, format_score
from meft_reports.methods import is_stored
from meft_reports.page.cells import is_trained
from meft_reports.page.pairs import PairedDifference
from meft_reports.page.settings import Setting
from meft_reports.rivals import has_equal_memory, is_held_against, is_rival
from meft_reports.text import plural

MOST_SENTENCES = 3
MOST_NAMES = 4
"""Number of settings that a list in a sentence names."""


def scores(
    settings: Sequence[Setting], pairs: Sequence[PairedDifference]
) -> list[Markup]:
    """Say for each task what scored best, and what is best at equal memory."""
    by_workload: dict[int, list[Setting]] = {}
    for setting in settings:
        scored = setting.numbers["score"] is not None and setting.has(is_trained)
        if scored and not is_stored(setting.method):
            by_workload.setdefault(setting.workload.index, []).append(setting)
    found: list[Markup] = []
    for its in sorted(by_workload.values(), key=len, reverse=True):
        if len({setting.method for setting in its}) < 2:
            continue
        several = [setting for setting in its if len(setting.ok) > 1]
        is_first = not found
        found.append(_best(several, pairs) if len(several) > 1 else _one_seed(its))
        front = _front(several or its, pairs)
        if is_first:
            found += [text for text in (front, _against(several, pairs)) if text]
    if len(found) > MOST_SENTENCES:
        rest = plural(len(found) - MOST_SENTENCES, "more workload")
        text = Markup("{} with scores: see the figures.").format(rest)
        found = [*found[:MOST_SENTENCES], text]
    return found


def front_of(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings that no other one beats in score and peak memory."""
    known = [
        s
        for s in settings
        if s.numbers["score"] is not None and s.numbers["peak_allocated_bytes"]
    ]
    known.sort(key=lambda s: (s.numbers["peak_allocated_bytes"], -(_score(s))))
    front: list[Setting] = []
    for setting in known:
        if not front or _score(setting) > _score(front[-1]):
            front.append(setting)
    return front


def _best(several: Sequence[Setting], pairs: Sequence[PairedDifference]) -> Markup:
    top = max(several, key=_score)
    if all(_score(s) == _score(top) for s in several):
        return _equal(several)
    verdicts = {
        id(pair.setting): pair
        for pair in pairs
        if pair.against is top and pair.verdict == "behind"
    }
    ties = [s for s in several if s is not top and id(s) not in verdicts]
    behind = [s for s in several if id(s) in verdicts]
    text = Markup("<b>{}</b>: <code>{}</code> has the highest mean score, {}").format(
        top.workload.title, top.name, format_score(_score(top))
    )
    majority = top.numbers["majority_score"]
    if majority is not None:
        text += Markup(" (most frequent answer: {})").format(format_score(majority))
    if ties:
        text += Markup(", which is not significantly different from {}").format(
            _list(ties, lambda s: format_score(_score(s)))
        )
    if behind:
        joint = "; it is ahead of" if ties else ", and is ahead of"
        text += Markup("{} {}").format(
            joint,
            _list(behind, lambda s: f"by {-verdicts[id(s)].interval.mean:.3f}"),
        )
    return text + "."


def _equal(its: Sequence[Setting]) -> Markup:
    return Markup("<b>{}</b>: all of {} have the same score, {}.").format(
        its[0].workload.title, plural(len(its), "setting"), format_score(_score(its[0]))
    )


def _one_seed(its: Sequence[Setting]) -> Markup:
    top = max(its, key=_score)
    if len(its) > 1 and all(_score(s) == _score(top) for s in its):
        return _equal(its)
    return Markup(
        "<b>{}</b>: <code>{}</code> has the highest score, {}, of one seed: no "
        "difference can be tested."
    ).format(top.workload.title, top.name, format_score(_score(top)))


def _front(its: Sequence[Setting], pairs: Sequence[PairedDifference]) -> Markup | None:
    """Say what is best at equal memory; None if one setting is best at any memory."""
    front = front_of(its)
    if len(front) < 2:
        return None
    apart = {
        (id(pair.setting), id(pair.against))
        for pair in pairs
        if pair.verdict == "ahead"
    }
    parts = []
    for before, setting in zip([None, *front], front, strict=False):
        tie = before is not None and (id(setting), id(before)) not in apart
        parts.append(
            Markup("{} <code>{}</code> {}{}").format(
                format_bytes(setting.numbers["peak_allocated_bytes"]),
                setting.name,
                format_score(_score(setting)),
                " (no significant difference from the one before)" if tie else "",
            )
        )
    if len(parts) > MOST_NAMES:
        parts = [*parts[: MOST_NAMES - 1], parts[-1]]
    return Markup("Best at equal memory, by mean score there: from {}.").format(
        Markup("; from ").join(parts)
    )


def _against(
    several: Sequence[Setting], pairs: Sequence[PairedDifference]
) -> Markup | None:
    """Hold each method of MEFT against the best rival at equal memory."""
    peaks = {id(s): s.numbers["peak_allocated_bytes"] for s in several}
    parts = []
    for setting in several:
        if not is_held_against(setting.method) or not peaks[id(setting)]:
            continue
        equal = [
            pair
            for pair in pairs
            if pair.setting is setting
            and is_rival(pair.against.method)
            and (peak := peaks.get(id(pair.against)))
            and has_equal_memory(peak, peaks[id(setting)] or 0)
        ]
        if equal:
            best = max(equal, key=lambda pair: _score(pair.against))
            parts.append((best.interval.mean, _verdict(best)))
    if not parts:
        return None
    parts.sort(key=lambda part: -part[0])
    texts = [text for _, text in parts[:MOST_NAMES]]
    if len(parts) > MOST_NAMES:
        texts.append(Markup("{} more").format(len(parts) - MOST_NAMES))
    return Markup(
        "Against the best other method that takes no more memory: {}."
    ).format(Markup("; ").join(texts))


def _verdict(pair: PairedDifference) -> Markup:
    low, high = pair.interval.low, pair.interval.high
    span = "" if low is None or high is None else f", {low:+.3f} to {high:+.3f}"
    return Markup("<code>{}</code> {} <code>{}</code> ({:+.3f}{})").format(
        pair.setting.name,
        {"ahead": "is ahead of", "behind": "is behind"}.get(
            pair.verdict, "is not significantly different from"
        ),
        pair.against.name,
        pair.interval.mean,
        span,
    )


def _list(settings: Sequence[Setting], say: Callable[[Setting], str]) -> Markup:
    shown = sorted(settings, key=_score, reverse=True)
    texts = [
        Markup("<code>{}</code> ({})").format(s.name, say(s))
        for s in shown[:MOST_NAMES]
    ]
    if len(shown) > MOST_NAMES:
        rest = len(shown) - MOST_NAMES
        texts.append(Markup("{}").format(plural(rest, "more setting")))
    return Markup(", ").join(texts)


def _score(setting: Setting) -> float:
    return setting.numbers["score"] or 0.0
