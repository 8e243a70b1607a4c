"""Numbers of the run for github-action-benchmark, which draws them over commits.

Its tools `customSmallerIsBetter` and `customBiggerIsBetter` read a list of entries. The
file has the columns of which less is better; columns of which more is better, such as
scores, are left out, as one file has one direction.
"""

import json

from meft_reports.check import CheckResult


def to_entries(result: CheckResult) -> str:
    """Return the compared numbers of the run as a list of entries in JSON."""
    entries = [
        {
            "name": f"{one.cell_id} {one.column.short_name}",
            "unit": one.column.unit or "number",
            "value": one.after,
        }
        for one in result.compared
        if one.column.lower_is_better
    ]
    return json.dumps(entries, indent=1, allow_nan=False) + "\n"
