"""Formats in which the verdict of `meft-report check` can be written: `--write`.

text            as on the terminal
markdown        for a pull request or a summary of a step
json            everything, for programs (schema `meft-check/1`)
junit           JUnit XML: a suite per sweep, a case per number
gha-benchmark   `customSmallerIsBetter` of github-action-benchmark
bmf             Bencher Metric Format

`github` has what GitHub Actions reads: a summary and annotations.
"""

from collections.abc import Callable

from meft_reports.check import CheckResult
from meft_reports.formats import bencher, benchmark_action, json_text, junit, markdown

FORMATS: dict[str, Callable[[CheckResult], str]] = {
    "text": lambda result: f"{result}\n",
    "markdown": markdown.to_markdown,
    "json": json_text.to_json,
    "junit": junit.to_junit,
    "gha-benchmark": benchmark_action.to_entries,
    "bmf": bencher.to_bmf,
}
"""Functions from a result to a text, by the name of the format."""
