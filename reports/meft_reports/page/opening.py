"""The workload that the page opens with, and the method that others are compared with.

A run of scores opens with the workload of most settings; a run of memory with the
largest one on which full fine-tuning and an exact method both fit, a measured one if
there is one.
"""

from collections.abc import Sequence

from meft_reports.methods import REFERENCE, is_exact
from meft_reports.page.cells import is_predicted, is_trained
from meft_reports.page.settings import Setting

_COMPARED_WITH = ("full", "dense", REFERENCE, "adapters", "lora")


def opening_workload(settings: Sequence[Setting]) -> int:
    """Return the index of the workload that the page opens with."""
    by_workload: dict[int, list[Setting]] = {}
    for setting in settings:
        by_workload.setdefault(setting.workload.index, []).append(setting)
    return max(by_workload, key=lambda index: (*_rank(by_workload[index]), -index))


def _rank(its: Sequence[Setting]) -> tuple[int, bool, bool, float, int]:
    num_scored = sum(s.numbers["score"] is not None and s.has(is_trained) for s in its)
    full = [s for s in its if s.method == "full" and s.ok]
    has_exact = any(is_exact(s.method) and s.ok for s in its)
    sizes = [s.numbers["model_state_bytes"] or 0.0 for s in full]
    num_ok = sum(bool(s.ok) for s in its)
    is_measured = not any(s.has(is_predicted) for s in its)
    has_both = bool(full) and has_exact
    return num_scored, is_measured, has_both, max(sizes, default=0.0), num_ok


def compared_with(settings: Sequence[Setting]) -> str:
    """Return the method that figures compare others with, until another is chosen."""
    methods = [setting.method for setting in settings if setting.ok]
    methods = methods or [setting.method for setting in settings]
    for method in _COMPARED_WITH:
        if method in methods:
            return method
    return max(sorted(set(methods)), key=methods.count)
