"""Where the numbers come from: distinct environments, weights and data, with counts."""

import collections
from collections.abc import Sequence

from meft_reports.page.cells import Cell

TABLES = {
    "Environments": (
        *("machine", "device_name", "cpu", "platform", "python_version"),
        *("torch_version", "transformers_version", "peft_version", "num_threads"),
        *("num_slots", "code_sha256", "commit", "dirty"),
    ),
    "Weights and data": (
        *("backbone", "weights_origin", "weights_sha256", "task", "data_origin"),
    ),
}
MOST_ROWS = 30
"""Number of rows of a table; more environments than that are rare."""

Table = tuple[str, list[str], list[list[str]], int]
"""Title, header, rows, and the number of rows that are left out."""


def origins_of(cells: Sequence[Cell]) -> list[Table]:
    """Return one table of each kind, the most frequent rows first."""
    found = []
    for title, names in TABLES.items():
        counts = collections.Counter(
            tuple(_text(name, cell[name]) for name in names) for cell in cells
        )
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        rows = [[f"{count:,}", *row] for row, count in ordered]
        header = ["cells", *(name.replace("_", " ") for name in names)]
        left_out = max(0, len(rows) - MOST_ROWS)
        found.append((title, header, rows[:MOST_ROWS], left_out))
    return found


def _text(name: str, value: object) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    if name in ("code_sha256", "weights_sha256", "commit"):
        return str(value)[:12]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
