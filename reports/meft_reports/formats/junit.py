"""The verdict as JUnit XML, which most systems for CI show: a case for each number.

A regression, or a cell that is missing, is a `failure`; a cell that failed is an
`error`; what is not comparable, and a cell that no threshold checks, is `skipped`.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable

from meft_reports.check import CheckResult, Finding, Kind
from meft_reports.text import printable

TAGS = {
    Kind.REGRESSION: "failure",
    Kind.MISSING: "failure",
    Kind.FAILED: "error",
    Kind.NOT_COMPARABLE: "skipped",
}
COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}
"""Attributes of a suite, with the tags that they count."""
SUITE = "memory"
WHOLE_CELL = "cell"
"""Name of the case of a finding that concerns no single number."""
LENGTH = 10_000


def to_junit(result: CheckResult) -> str:
    """Return the result as JUnit XML."""
    cases: dict[tuple[str, str], list[Finding]] = {}
    for one in result.compared:
        cases.setdefault((one.cell_id, one.column.name), [])
    for finding in result.findings:
        name = finding.cell_id, finding.column or WHOLE_CELL
        cases.setdefault(name, []).append(finding)
    suite = ET.Element("testsuite", name=SUITE)
    for (cell_id, column), findings in cases.items():
        case = ET.SubElement(
            suite, "testcase", classname=_text(cell_id), name=_text(column)
        )
        for finding in findings:
            if finding.kind in TAGS:
                tag = ET.SubElement(case, TAGS[finding.kind])
                tag.set("message", _text(_message(finding)))
                tag.text = "\n".join(map(_text, str(finding).splitlines()))
    for cell_id in result.unchecked:
        case = ET.SubElement(
            suite, "testcase", classname=_text(cell_id), name=WHOLE_CELL
        )
        ET.SubElement(case, "skipped", message="no threshold of --fail-on applies")
    for number, kind in COUNTED.items():
        suite.set(number, str(_count(suite, kind)))
    suite.set("tests", str(len(suite)))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode", xml_declaration=False)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _count(suite: Iterable[ET.Element], tag: str) -> int:
    return sum(case.find(tag) is not None for case in suite)


def _message(finding: Finding) -> str:
    change = f" ({finding.difference})" if finding.difference else ""
    return f"{finding.kind}: expected {finding.expected}, got {finding.got}{change}"


def _text(text: str) -> str:
    """Return a text without characters that XML does not have."""
    return printable(text, LENGTH)
