"""Settings: a method and its options on one workload, averaged over seeds.

A number is the mean over the setting's ok cells. Cells that differ in an option that
their method uses are different settings, and cells of different workloads or places are
never averaged.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meft_reports.format import format_bytes
from meft_reports.intervals import (
    Interval,
    over_seeds,
    over_seeds_and_rows,
    row_values,
    same_rows,
)
from meft_reports.page.cells import (
    Cell,
    is_answer,
    is_assumed,
    is_of_trial,
    is_predicted,
    is_trained,
    is_untrained,
)
from meft_reports.page.oom import at_least_bytes
from meft_reports.page.workloads import Workload, key_of, workloads_of
from meft_reports.style import method_order
from meft_reports.summary import OPTIONS

MEANS = (
    *("saved_bytes", "model_state_bytes", "peak_allocated_bytes"),
    *("peak_activation_bytes", "peak_reserved_bytes", "peak_host_bytes"),
    *("h2d_bytes", "d2h_bytes", "transfer_bytes", "paper_transfer_bytes"),
    *("dense_transfer_bytes", "step_seconds", "step_ratio", "step_ratio_iqr"),
    *("score", "majority_score", "second_score", "start_deviation", "num_blocks"),
)
"""Columns of numbers, averaged over seeds."""
WORST = ("gradient_error", "reconstruction_error")
"""Columns of lists by block, of which the greatest entry of all seeds counts."""
MEAN_OF_LIST = ("union_fraction", "routing_recall")
"""Columns of lists by block, averaged over blocks and seeds."""
NUMBERS = (*MEANS, *WORST, *MEAN_OF_LIST)

NAMES = {
    "lost_bits": "k",
    "reversible_blocks": "rebuilt",
    "row_budget_bytes": "budget",
    "active_fraction": "active",
}
"""How an option is called in the name of a setting."""
OF_PROTOCOL = (
    *("warmup_steps", "eval_every", "eval_rows", "train_rows", "patience"),
    *("max_steps", "learning_rate", "reference"),
)
"""Options of the training, which a name mentions only where nothing else differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One method with its options on one workload, over seeds."""

    workload: Workload
    method: str
    options: dict[str, Any]
    """Options that differ within the run, by name; None where the method has none."""
    variant: str
    """Options in which the method's settings on the workload differ; may be empty."""
    cells: tuple[Cell, ...]
    ok: tuple[Cell, ...]
    numbers: dict[str, float | None]
    """By `NUMBERS`; None where nothing was measured, or not finite."""

    @property
    def name(self) -> str:
        """The method and its options."""
        return f"{self.method} · {self.variant}" if self.variant else self.method

    @property
    def status(self) -> str:
        """`ok` if one cell ended well, otherwise the most frequent other status."""
        found = [cell["status"] for cell in self.cells]
        return "ok" if self.ok else statistics.mode(sorted(found))

    @property
    def seeds(self) -> str:
        """The seeds of the ok cells, e.g. `0, 1, 2`."""
        return ", ".join(str(s) for s in sorted(cell["seed"] for cell in self.ok))

    @property
    def least_bytes(self) -> int | None:
        """What a step that does not fit needs at least; None if that is unknown."""
        found = [
            at_least_bytes(c["message"]) for c in self.cells if c["status"] == "oom"
        ]
        return max((size for size in found if size is not None), default=None)

    def has(self, test: Callable[[Cell], bool]) -> bool:
        """Return whether `test` is true of a cell."""
        return any(test(cell) for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the row of the setting in the page's data."""
        interval, num_rows = _interval_of_score(self.ok)
        ratios = [c for c in self.ok if c["step_ratio"] is not None]
        return {
            "w": self.workload.index,
            "cell": self.cells[0]["index"],
            "method": self.method,
            "variant": self.variant,
            "name": self.name,
            "status": self.status,
            "seeds": self.seeds,
            "num_seeds": len(self.ok),
            "num_failed": len(self.cells) - len(self.ok),
            "is_trained": self.has(is_trained) or None,
            "is_start": self.has(is_untrained) or None,
            "is_assumed": self.has(is_assumed) or None,
            "is_predicted": self.has(is_predicted) or None,
            "is_answer": self.has(is_answer) or None,
            "is_trial": is_of_trial(self.cells[0]) or None,
            "reference": self.cells[0]["reference"] or None,
            "least_bytes": self.least_bytes,
            "score_low": interval and interval.low,
            "score_high": interval and interval.high,
            "score_rows": num_rows or None,
            "num_turns": sum(len(c["all_step_seconds"] or ()) for c in ratios) or None,
            **self.options,
            **self.numbers,
        }


def _interval_of_score(ok: Sequence[Cell]) -> tuple[Interval | None, int]:
    """Return the interval of the mean score, and over how many rows; 0: over seeds."""
    scored = [cell for cell in ok if cell["score"] is not None]
    if not scored:
        return None, 0
    scores = [cell["score"] for cell in scored]
    rows = same_rows(
        [row_values(c["score"], c["right_rows"], c["row_scores"]) for c in scored]
    )
    if rows is None or len(scored) < 2:
        return over_seeds(scores), 0
    return over_seeds_and_rows(rows), len(rows[0])


def settings_of(cells: Sequence[Cell]) -> list[Setting]:
    """Return the settings of cells, by workload and in the order of methods."""
    workloads = workloads_of(cells)
    varying = [name for name in OPTIONS if len({c[name] for c in cells}) > 1]
    siblings: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        siblings.setdefault(_siblings_key(cell), []).append(cell)
    differing = {
        key: [name for name in varying if len({cell[name] for cell in its}) > 1]
        for key, its in siblings.items()
    }
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        options = tuple(cell[name] for name in varying)
        groups.setdefault((key_of(cell), cell["method"], options), []).append(cell)
    found = [
        Setting(
            workload=workloads[key],
            method=method,
            options=dict(zip(varying, options, strict=True)),
            variant=_variant(its[0], differing[_siblings_key(its[0])]),
            cells=tuple(its),
            ok=(ok := tuple(cell for cell in its if cell["status"] == "ok")),
            numbers=_numbers(ok),
        )
        for (key, method, options), its in groups.items()
    ]
    found.sort(key=lambda s: (s.workload.index, method_order(s.method), s.variant))
    return found


def _purpose(cell: Cell) -> str:
    """Return what a cell is for where it is not the usual measurement."""
    if is_untrained(cell):
        return "before training"
    if is_of_trial(cell):
        return "trial"
    if cell["reference"]:
        return "timed"
    is_real = not cell["task"].startswith("synthetic")
    return "one step" if is_real and cell["max_steps"] <= 1 else ""


def _siblings_key(cell: Cell) -> tuple[Any, ...]:
    """Return what settings have in common whose names have to differ."""
    return key_of(cell), cell["method"], _purpose(cell)


def _variant(cell: Cell, differing: Sequence[str]) -> str:
    """Return the options in which a setting differs from its siblings, in words."""
    shown = [name for name in differing if name not in OF_PROTOCOL] or differing
    parts = [_purpose(cell)] if _purpose(cell) else []
    parts += [
        f"{NAMES.get(name, name.replace('_', ' '))}={_short(name, cell[name])}"
        for name in shown
        if cell[name] is not None and cell[name] != ""
    ]
    return ", ".join(parts)


def _short(name: str, value: Any) -> str:
    if name == "reversible_blocks" and value == 0:
        return "all"
    if name == "active_fraction":
        return f"{100 * value:g} %" + (" (assumed)" if value < 1 else "")
    if name.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(ok: Sequence[Cell]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in MEANS:
        values = [cell[name] for cell in ok if cell[name] is not None]
        found[name] = statistics.fmean(values) if values else None
    for name in WORST:
        entries = [e for cell in ok for e in cell[name] or ()]
        found[name] = None if not entries or _has_nan(entries) else max(entries)
    for name in MEAN_OF_LIST:
        entries = [e for cell in ok for e in cell[name] or () if e == e]
        found[name] = statistics.fmean(entries) if entries else None
    return found


def _has_nan(values: Sequence[float]) -> bool:
    return any(value != value for value in values)
