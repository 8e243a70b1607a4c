"""The result of a check of some records against others."""

from meft_reports.check import CheckResult, check
from meft_reports.frame import to_frame
from meft_reports.threshold import parse_threshold
from reporting.kinds import Record


def verdict(expected: list[Record], got: list[Record], *limits: str) -> CheckResult:
    """The result of holding some records against others."""
    thresholds = [parse_threshold(limit) for limit in limits]
    return check(to_frame(got), to_frame(expected), thresholds)
