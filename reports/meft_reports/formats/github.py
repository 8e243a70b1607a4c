"""What GitHub Actions reads of a verdict: annotations, and the summary of a step.

A step shows ten errors and ten warnings, so the worst nine of each are written, and how
many more there are.
"""

from collections.abc import Iterator, Sequence

from meft_reports.check import CheckResult, Finding, Kind
from meft_reports.text import plural

MOST_SHOWN = 9
LENGTH = 4_000
"""Number of characters of an annotation."""
ERRORS = (Kind.FAILED, Kind.REGRESSION, Kind.MISSING)
WARNINGS = (Kind.NOT_COMPARABLE,)


def annotations(result: CheckResult) -> Iterator[str]:
    """Yield the lines that GitHub Actions shows as errors and warnings."""
    for level, kinds in (("error", ERRORS), ("warning", WARNINGS)):
        found = [finding for finding in result.findings if finding.kind in kinds]
        yield from _level(level, found)
    if result.unchecked:
        cells = plural(len(result.unchecked), "cell")
        yield f"::warning title=not checked::no threshold applies to {cells}"


def _level(level: str, findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings[:MOST_SHOWN]:
        title = f"{finding.kind}: {finding.column or finding.cell_id}"
        yield f"::{level} title={_property(title)}::{_message(str(finding))}"
    left_out = len(findings) - MOST_SHOWN
    if left_out > 0:
        more = plural(left_out, "more finding")
        yield f"::{level} title=meft-report check::and {more}, in the log"


def _message(text: str) -> str:
    """Escape the message of a command, as its syntax requires."""
    text = text[:LENGTH]
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
