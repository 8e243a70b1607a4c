"""The verdict as JSON, for programs."""

import json
import math
from collections import Counter
from typing import Any

from meft_reports.check import CheckResult, Finding, Kind
from meft_reports.compared import Number

SCHEMA = "meft-check/1"


def to_json(result: CheckResult) -> str:
    """Return the result as JSON: exit code, counts, and every finding."""
    counts = Counter(finding.kind for finding in result.findings)
    value = {
        "schema": SCHEMA,
        "exit_code": result.exit_code,
        "num_cells": result.num_cells,
        "num_compared": len(result.compared),
        "not_checked": list(result.unchecked),
        "counts": {str(kind): counts[kind] for kind in Kind},
        "findings": [_finding(finding) for finding in result.findings],
        "notes": list(result.notes),
    }
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": str(finding.kind),
        "cell_id": finding.cell_id,
        "column": finding.column or None,
        "unit": finding.unit or None,
        "expected": finding.expected,
        "got": finding.got,
        "expected_number": _finite(finding.before),
        "got_number": _finite(finding.after),
        "difference": finding.difference or None,
        "allowed": finding.allowed or None,
        "advice": finding.advice or None,
        "grew": list(finding.grew),
    }


def _finite(number: Number | None) -> Number | None:
    return number if number is not None and math.isfinite(number) else None
