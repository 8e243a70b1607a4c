"""Sentence on what fits in a GPU of 24 GB, by the peaks of the run.

    fits    peak <= 24 GiB - 1 GiB

A method fits on a workload if it does on one device, with one version of the code. The
peak is the reserved one where it is known, else the allocated one; the rest is for
the context of CUDA and for what the allocator cannot use. A step that ran out of memory
does not fit if it needed more than that; of a smaller GPU, nothing is known. An
assumed share of active neurons is no result, so such settings do not count.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from meft_reports.format import format_bytes
from meft_reports.methods import REFERENCE, is_exact, is_stored
from meft_reports.page.cells import is_assumed, is_predicted, is_untrained
from meft_reports.page.settings import Setting
from meft_reports.summary import WORKLOAD
from meft_reports.text import plural

CARD = "24 GB"
USABLE_BYTES = 23 * 2**30
_FIRST = ("full", "lora", "checkpointing", REFERENCE)
MOST_NAMES = 5


class _Peak(NamedTuple):
    """What a method needs at least on a workload, and whether that fits."""

    fits: bool
    num_bytes: float
    setting: Setting


def fits_card(settings: Sequence[Setting]) -> list[Markup]:
    """Say how many workloads fit by which method, and which is the largest."""
    peaks = _peaks(settings)
    every = [peak for setting in settings if (peak := _peak(setting)) is not None]
    known = [peak for its in peaks.values() for peak in its.values()]
    if not known:
        return []
    is_measured = all(_is_measured(peak.setting) for peak in known)
    word, need = ("fits", "needs") if is_measured else ("would fit", "would need")
    fitting = [peak for peak in known if peak.fits]
    if not fitting:
        least = min(known, key=lambda peak: peak.num_bytes)
        return [
            Markup(
                "Nothing of this run {} in a GPU of {}; {} on {} {} least, {}."
            ).format(word, CARD, _code(least), _title(least), need, _size(least))
        ]
    if all(peak.fits for peak in every):
        most = max(every, key=lambda peak: peak.num_bytes)
        return [
            Markup(
                "Every setting{} {} in a GPU of <b>{}</b>; {} on {} {} most, {}."
            ).format(
                _but_for_assumed(settings),
                *(word, CARD, _code(most), _title(most), need, _size(most)),
            )
        ]
    largest = max(fitting, key=lambda peak: (_rests(peak), -peak.num_bytes))
    counts: list[Markup] = []
    for method in _shown(fitting, known):
        its = [found[method] for found in peaks.values() if method in found]
        number = sum(peak.fits for peak in its)
        noun = "" if counts else " workload" if len(its) == 1 else " workloads"
        counts.append(
            Markup("<code>{}</code> in {} of {}{}").format(
                method, number, len(its), noun
            )
        )
    return [
        Markup(
            "A GPU of <b>{}</b> {} {}; the largest that {} is {} with {}, {}."
        ).format(
            CARD,
            "holds" if is_measured else "would hold",
            Markup(", ").join(counts),
            word,
            _title(largest),
            _code(largest),
            _size(largest),
        )
    ]


def _but_for_assumed(settings: Sequence[Setting]) -> str:
    """Return which settings a sentence on every setting is not about, in words."""
    count = sum(setting.has(is_assumed) for setting in settings)
    which = plural(count, "setting")
    return f", but for {which} with an assumed share of neurons," if count else ""


def _peaks(settings: Sequence[Setting]) -> dict[Any, dict[str, _Peak]]:
    """Return the least peak by workload, whatever the device, and method."""
    found: dict[Any, dict[str, _Peak]] = {}
    for setting in settings:
        peak = _peak(setting)
        if peak is None:
            continue
        fields = setting.workload.fields
        same = tuple(fields[name] for name in WORKLOAD if name != "device")
        its = found.setdefault(same, {})
        other = its.get(setting.method)
        if other is None or (not peak.fits, peak.num_bytes) < (
            not other.fits,
            other.num_bytes,
        ):
            its[setting.method] = peak
    return found


def _peak(setting: Setting) -> _Peak | None:
    if setting.cells[0]["reference"] or is_stored(setting.method):
        return None
    if setting.has(is_untrained) or setting.has(is_assumed):
        return None
    numbers = setting.numbers
    size = numbers["peak_reserved_bytes"] or numbers["peak_allocated_bytes"]
    if size:
        return _Peak(size <= USABLE_BYTES, size, setting)
    least = setting.least_bytes if setting.status == "oom" else None
    return _Peak(False, least, setting) if least and least > USABLE_BYTES else None


def _shown(fitting: Sequence[_Peak], known: Sequence[_Peak]) -> list[str]:
    """Return the methods that the sentence counts."""
    methods = list(dict.fromkeys(peak.setting.method for peak in known))
    exact = [peak.setting.method for peak in fitting if is_exact(peak.setting.method)]
    best = [max(sorted(set(exact)), key=exact.count)] if exact else []
    first = [method for method in (*_FIRST, *best) if method in methods]
    return [*first, *(m for m in methods if m not in first and not best)][:MOST_NAMES]


def _is_measured(setting: Setting) -> bool:
    return setting.workload.fields["device"] == "cuda" and not setting.has(is_predicted)


def _rests(peak: _Peak) -> float:
    return peak.setting.numbers["model_state_bytes"] or 0.0


def _code(peak: _Peak) -> Markup:
    return Markup("<code>{}</code>").format(peak.setting.name)


def _title(peak: _Peak) -> str:
    return peak.setting.workload.title


def _size(peak: _Peak) -> str:
    more = "" if peak.setting.ok else "more than "
    return f"{more}{format_bytes(peak.num_bytes)}"
