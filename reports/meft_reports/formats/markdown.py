"""The verdict as Markdown: findings in a table, and what grew in folded sections.

GitHub drops a summary of a step above 1 MiB, so the text ends before `MOST_BYTES`.
"""

import re

from meft_reports.check import CheckResult, Finding, Kind
from meft_reports.text import plural

MOST_BYTES = 900_000
_SPECIAL = re.compile(r"[\\`*_\[\]|~$@#&<>]")
WORDS = {0: "passed", 1: "failed", 3: "not comparable", 4: "failed"}
"""The verdict by exit code."""


def to_markdown(result: CheckResult) -> str:
    """Return the result as Markdown of GitHub's flavour."""
    head = [
        f"### Memory check: {WORDS[result.exit_code]}",
        "",
        result.summary,
        "",
    ]
    if result.findings:
        head += ["| | cell | column | expected | got | difference |", "|" + "---|" * 6]
    parts = [_row(finding) for finding in result.findings]
    text = "\n".join(head) + "\n"
    text, num_rows = _filled(text, parts)
    if num_rows < len(parts):
        text += f"\n{plural(len(parts) - num_rows, 'more finding')}.\n"
        return text
    folded = [_folded(finding) for finding in result.findings if finding.grew]
    text, num_folded = _filled(text + "\n", folded)
    if num_folded < len(folded):
        left_out = plural(len(folded) - num_folded, "more finding")
        return text + f"\nWhat grew in {left_out} is left out.\n"
    notes = [f"- {_escaped(note)}\n" for note in result.notes]
    return _filled(text + "\n" * bool(notes), notes)[0]


def _filled(text: str, parts: list[str]) -> tuple[str, int]:
    """Return the text with as many parts as there is room for, and their number."""
    size = len(text.encode())
    for number, part in enumerate(parts):
        size += len(part.encode())
        if size > MOST_BYTES:
            return text + "".join(parts[:number]), number
    return text + "".join(parts), len(parts)


def _row(finding: Finding) -> str:
    is_bad = finding.kind not in (Kind.IMPROVED, Kind.NEW)
    cells = [
        f"**{finding.kind}**" if is_bad else str(finding.kind),
        f"<code>{_escaped(finding.cell_id)}</code>",
        finding.column,
        finding.expected,
        finding.got,
        finding.difference,
    ]
    shown = [cells[0], cells[1], *map(_escaped, cells[2:])]
    return f"| {' | '.join(shown)} |\n"


def _folded(finding: Finding) -> str:
    lines = "\n".join(map(_escaped_code, finding.grew))
    title = _escaped(f"{finding.cell_id} {finding.column}: what grew")
    return (
        f"<details><summary>{title}</summary>\n\n<pre>\n{lines}\n</pre>\n\n</details>\n"
    )


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, in a cell of a table."""
    text = _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)
    return " ".join(text.split())


def _escaped_code(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
