"""What counts as a difference in this run, and how a cell of it is run again."""

from collections.abc import Sequence

from markupsafe import Markup

from meft_reports.methods import is_exact, is_stored
from meft_reports.page.cells import is_trained
from meft_reports.page.opening import opening_workload
from meft_reports.page.pairs import TIE, PairedDifference
from meft_reports.page.settings import Setting
from meft_reports.text import plural


def differences_that_count(
    settings: Sequence[Setting], pairs: Sequence[PairedDifference]
) -> list[Markup]:
    """Return a sentence for each kind of number that the run has."""
    found = []
    if any(setting.numbers["peak_allocated_bytes"] for setting in settings):
        found.append(Markup("Bytes are counted, so a difference needs no test."))
    num_pairs = len(_once(pairs))
    num_apart = len(_once([pair for pair in pairs if pair.verdict != TIE]))
    if num_pairs:
        found.append(
            Markup(
                "Scores: <b>{} of {}</b> on the same seeds {} significantly."
            ).format(
                f"{num_apart:,}",
                plural(num_pairs, "pair"),
                "differs" if num_pairs == 1 else "differ",
            )
        )
    elif any(s.numbers["score"] is not None and s.has(is_trained) for s in settings):
        found.append(Markup("Scores: too few seeds to test any difference."))
    if any(setting.numbers["step_ratio"] is not None for setting in settings):
        found.append(Markup("Times: compare those timed in turns only."))
    elif any(setting.numbers["step_seconds"] is not None for setting in settings):
        found.append(Markup("Times: none was timed in turns, so compare none."))
    return found


def example_cell(settings: Sequence[Setting]) -> tuple[int, str] | None:
    """Return the position and method of a cell to open first; None without cells."""
    if not settings:
        return None
    opening = opening_workload(settings)
    its = [setting for setting in settings if setting.workload.index == opening]

    def rank(setting: Setting) -> tuple[bool, bool, float]:
        is_ours = is_exact(setting.method) and not is_stored(setting.method)
        return bool(setting.ok), is_ours, setting.numbers["score"] or 0.0

    best = max(its, key=rank)
    return (best.ok or best.cells)[0]["index"], best.method


def _once(pairs: Sequence[PairedDifference]) -> set[frozenset[int]]:
    """Return pairs without their order."""
    return {frozenset((id(pair.setting), id(pair.against))) for pair in pairs}
