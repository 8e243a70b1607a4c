"""What to keep in mind about the numbers of a run, by rules from its cells."""

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meft_reports.columns.cell import STATUSES
from meft_reports.page.cells import (
    Cell,
    is_answer,
    is_assumed,
    is_predicted,
    is_trained,
)
from meft_reports.page.settings import Setting
from meft_reports.searches import found_nothing, is_at_least
from meft_reports.text import plural

FEW_SEEDS = 5
FEW_ROWS = 1000
TITLE_LENGTH = 110
PLACES = {
    "code_sha256": "versions of the code",
    "torch_version": "versions of torch",
    "machine": "machines",
}
OLD_RULES = {
    "equal_batches": "micro-batches of a step had equal weights, whatever their "
    "numbers of target tokens",
    "undecayed_rows": "rows of sparse adapters had no weight decay, where the neurons "
    "of dense adapters had",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Caveat:
    """One line, its explanation, and the cells that it is about."""

    title: str
    text: str
    cells: list[int] = field(default_factory=list)
    """Positions in the frame."""


def caveats_of(cells: Sequence[Cell], settings: Sequence[Setting]) -> list[Caveat]:
    """Return the caveats of a run that are about at least one cell.

    Args:
        cells: every cell of the frame.
        settings: the settings that they make.
    """
    found = [
        *_of_sweeps(cells),
        _of_searches(cells),
        _predicted(cells),
        _random_weights(cells),
        _assumed(cells),
        *_several_places(cells),
        _uncommitted(cells),
        _few_seeds(settings),
        _few_rows(cells),
        _nothing_learned(cells),
        *_old_training(settings),
        _side_by_side(cells),
        _contaminated(cells),
        _shared(cells),
        *_failed(cells),
        _not_finite(cells),
    ]
    return [caveat for caveat in found if caveat.cells]


def has_random_weights(cell: Cell) -> bool:
    """Return whether the backbone of the cell had random weights."""
    origin = cell["weights_origin"] or ""
    return bool(origin.startswith("random") or cell["backbone"].startswith("random:"))


def _where(cells: Sequence[Cell], test: Callable[[Cell], Any]) -> list[int]:
    return [index for index, cell in enumerate(cells) if test(cell)]


def _of_sweeps(cells: Sequence[Cell]) -> list[Caveat]:
    """What the sweeps themselves say, in the order of their lines."""
    found: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        for line in (cell["sweep_caveats"] or "").splitlines():
            if line.strip() and not is_answer(cell):
                found.setdefault(line.strip(), []).append(index)
    caveats = []
    for line, its in found.items():
        sweeps = ", ".join(sorted({cells[index]["sweep"] for index in its}))
        title = _shortened(line)
        rest = "" if title == line else f"{line} "
        text = f"{rest}So says the sweep {sweeps}, of {plural(len(its), 'cell')}."
        caveats.append(Caveat(title=title, text=text, cells=its))
    return caveats


def _shortened(line: str) -> str:
    """Return a line of at most `TITLE_LENGTH` characters, cut between words."""
    if len(line) <= TITLE_LENGTH:
        return line
    return f"{line[: TITLE_LENGTH - 3].rpartition(' ')[0].rstrip(',;:')}..."


def _of_searches(cells: Sequence[Cell]) -> Caveat:
    """How `fit` searched; the options of several searches are in one text."""
    found = _where(cells, is_answer)
    asked = sorted({cells[i]["sweep_caveats"] or "" for i in found} - {""})
    several = f" with {plural(len(asked), 'set')} of options" if len(asked) > 1 else ""
    return Caveat(
        title=f"Answers of searches by fit{several}: {plural(len(found), 'cell')}",
        text=f"No cell has run; each is the largest that would fit. {' '.join(asked)}",
        cells=found,
    )


def _predicted(cells: Sequence[Cell]) -> Caveat:
    found = _where(cells, is_predicted)
    # Ways of several cells share most of their clauses.
    ways = list(
        dict.fromkeys(
            clause
            for way in sorted({cells[i]["prediction"] or "" for i in found} - {""})
            for clause in way.split("; ")
        )
    )
    return Caveat(
        title=f"{len(found):,} of {plural(len(cells), 'cell')} predicted, not measured",
        text="Nothing ran on a GPU. How the numbers came about: "
        f"{'; '.join(ways) or 'unknown'}. How close such predictions were to an H200 "
        "is in docs/virtual-gpu.md.",
        cells=found,
    )


def _random_weights(cells: Sequence[Cell]) -> Caveat:
    found = _where(cells, has_random_weights)
    return Caveat(
        title=f"Random weights in {plural(len(found), 'cell')}",
        text="Sizes and times do not depend on them. Scores are of training from "
        "scratch, and mean nothing where a method freezes the backbone.",
        cells=found,
    )


def _assumed(cells: Sequence[Cell]) -> Caveat:
    found = _where(cells, is_assumed)
    return Caveat(
        title=f"Assumed sparsity in {plural(len(found), 'cell')}",
        text="The share of active neurons was declared, not observed. It is never "
        "drawn as a result, and what follows from it is marked as assumed.",
        cells=found,
    )


def _several_places(cells: Sequence[Cell]) -> list[Caveat]:
    found = []
    for name, nouns in PLACES.items():
        counts = collections.Counter(cell[name] for cell in cells if cell[name])
        if len(counts) < 2:
            continue
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        length = 8 if name == "code_sha256" else 60
        named = ", ".join(
            f"{value[:length]}: {count:,}" for value, count in ordered[:4]
        )
        most = ordered[0][0]
        found.append(
            Caveat(
                title=f"{len(counts)} {nouns}",
                text=f"Cells by {nouns}: {named}{', ...' * (len(ordered) > 4)}. Their "
                "numbers are never averaged or drawn in one comparison.",
                cells=[i for i, cell in enumerate(cells) if cell[name] != most],
            )
        )
    return found


def _uncommitted(cells: Sequence[Cell]) -> Caveat:
    found = _where(cells, lambda cell: cell["dirty"])
    return Caveat(
        title=f"Uncommitted code in {plural(len(found), 'cell')}",
        text="Tracked files differed from the commit, so no commit has the code that "
        "ran.",
        cells=found,
    )


def _few_seeds(settings: Sequence[Setting]) -> Caveat:
    scored = [s for s in settings if s.numbers["score"] is not None]
    scored = [setting for setting in scored if setting.has(is_trained)]
    few = [setting for setting in scored if len(setting.ok) < FEW_SEEDS]
    counts = sorted({len(setting.ok) for setting in scored}) or [0]
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return Caveat(
        title=f"Few seeds: {span} per setting",
        text="Intervals over so few seeds are wide, and settings of one seed have "
        "none.",
        cells=sorted(cell["index"] for setting in few for cell in setting.cells),
    )


def _few_rows(cells: Sequence[Cell]) -> Caveat:
    def is_small(cell: Cell) -> bool:
        is_scored = cell["score"] is not None and is_trained(cell)
        return is_scored and 0 < (cell["num_eval_rows"] or 0) < FEW_ROWS

    found = _where(cells, is_small)
    least = min((cells[i]["num_eval_rows"] for i in found), default=1)
    half = 1.96 * math.sqrt(0.24 / least)
    return Caveat(
        title=f"Small evaluation: {plural(least, 'row')}",
        text=f"One row is {100 / least:.2g} % of the score; the interval of 95 % of "
        f"one score near 0.6 is ±{half:.3f}.",
        cells=found,
    )


def _nothing_learned(cells: Sequence[Cell]) -> Caveat:
    def is_low(cell: Cell) -> bool:
        known = cell["score"] is not None and cell["majority_score"] is not None
        learns = known and is_trained(cell)
        return bool(learns and cell["score"] <= cell["majority_score"])

    found = _where(cells, is_low)
    return Caveat(
        title=f"{plural(len(found), 'cell')} no better than the most frequent answer",
        text="They have learned nothing. Their memory and time still count.",
        cells=found,
    )


def _old_training(settings: Sequence[Setting]) -> list[Caveat]:
    found = []
    for flag, text in OLD_RULES.items():
        cells = [c["index"] for setting in settings for c in setting.cells if c[flag]]
        found.append(
            Caveat(
                title=f"Older training rules in {plural(len(cells), 'cell')}",
                text=f"In the code that trained them, {text}.",
                cells=sorted(cells),
            )
        )
    return found


def _side_by_side(cells: Sequence[Cell]) -> Caveat:
    def is_timed(cell: Cell) -> bool:
        return cell["step_seconds"] is not None and (cell["num_slots"] or 1) > 1

    found = _where(cells, is_timed)
    return Caveat(
        title=f"Timed side by side: {plural(len(found), 'cell')}",
        text="Several cells ran at the same time on one machine, which disturbs their "
        "times. Ratios of steps timed in turns suffer least.",
        cells=found,
    )


def _contaminated(cells: Sequence[Cell]) -> Caveat:
    found = _where(
        cells,
        lambda cell: cell["num_foreign_processes"] and not cell["is_gpu_shared"],
    )
    return Caveat(
        title=f"{plural(len(found), 'cell')} contaminated by others on the GPU",
        text="Other processes used the GPU. Times, energy, clocks, and bytes of the "
        "whole GPU and its link depend on them, and are left out; the files of the run "
        "keep them. What torch allocated, ledgers and scores are valid. To measure the "
        "rest, run these cells again on a free GPU with --force.",
        cells=found,
    )


def _shared(cells: Sequence[Cell]) -> Caveat:
    found = _where(cells, lambda cell: bool(cell["is_gpu_shared"]))
    return Caveat(
        title=f"No times: {plural(len(found), 'cell')} shared a GPU",
        text="Other cells ran on the same GPU at the same time (--pack), so times, and "
        "what NVML measures of the whole GPU, are left out. Memory that the process "
        "allocated is exact.",
        cells=found,
    )


def _failed(cells: Sequence[Cell]) -> list[Caveat]:
    answers = _where(cells, lambda cell: found_nothing(cell["sweep"], cell["status"]))
    found = [
        Caveat(
            title=f"Nothing fits in {plural(len(answers), 'answer')} of fit",
            text="Even the smallest value needs more than its margin leaves. No cell "
            "has run, so none has failed.",
            cells=answers,
        )
    ]
    for status in STATUSES[1:]:
        ended = [i for i, cell in enumerate(cells) if cell["status"] == status]
        its = sorted({*ended} - {*answers})
        is_oom = status == "oom"
        end = "out of memory" if is_oom else f"ended with {status}"
        found.append(
            Caveat(
                title=f"{plural(len(its), 'cell')} {end}",
                text="That is a result: the step needs more than the device has."
                if is_oom
                else "Their numbers are missing; each row of the table says why.",
                cells=its,
            )
        )
    return found


def _not_finite(cells: Sequence[Cell]) -> Caveat:
    found = _where(
        cells,
        lambda cell: (
            cell["status"] == "ok"
            and "the loss was not finite" in (cell["message"] or "")
            and not is_at_least(cell["sweep"], cell["status"], cell["message"])
        ),
    )
    return Caveat(
        title=f"{plural(len(found), 'cell')} whose loss was not finite",
        text="They ended well, but their training diverged in some step.",
        cells=found,
    )
