"""Trials: values of fields that scores on rows set aside choose, for each method.

A matrix can declare values to try, `tune`, such as several learning rates. For
every method on every task, with every option, there is one trial for each value:

    trial      seed `protocol.TRIAL_SEED`, scored on the rows set aside (`scored_on`)
    cell       the seeds of the matrix, the value of the best trial, scored as usual

The rows of evaluation therefore choose nothing, all methods have equally many trials,
and trials are records like others. Of equal scores, the first value is taken. A trial
that failed or diverged does not count; where none is left, the cells are not run.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.shared import methods, protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Record, Status

Value = str | int | float
UNTUNABLE = frozenset(
    {
        *("method", "backbone", "depth", "task", "seed", "device", "reference"),
        *("scored_on", "train_rows", "eval_rows", "warmup_steps"),
    }
)
"""Fields that say what is compared, or how; they are never tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Cells that wait for the best of some trials."""

    fields: tuple[str, ...]
    """The fields that the trials choose."""
    trials: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    """With the values of the first trial, until there is a best one."""

    def cells_with(self, best: Cell) -> tuple[Cell, ...]:
        """Return the cells with the values of a trial."""
        values: dict[str, Any] = {name: getattr(best, name) for name in self.fields}
        return tuple(dataclasses.replace(cell, **values) for cell in self.cells)


def check(tune: Mapping[str, Sequence[Value]], cells: Iterable[Cell]) -> None:
    """Raise `ValueError` if values cannot be tried with some cells.

    Args:
        tune: values to try by the name of a field.
        cells: the cells of the matrix, with any of the values.
    """
    if not tune:
        return
    for name, values in tune.items():
        if name in UNTUNABLE:
            raise ValueError(
                f"`{name}` says what is compared, and is not chosen by trials: make it "
                "an axis"
            )
        if len(set(values)) < 2:
            raise ValueError(f"`{name}` has one value to try; set it in defaults")
    options = {option for method in methods.TABLE.values() for option in method.options}
    for cell in cells:
        method = methods.TABLE.get(cell.method)
        for name in tune:
            if method is not None and name in options - {*method.options}:
                raise ValueError(
                    f"method {cell.method!r} does not use `{name}`, so that its trials "
                    "would be the same: give it a matrix of its own"
                )
        if cell.task.startswith("synthetic"):
            raise ValueError(f"task {cell.task!r} has no score to choose by")
        if cell.seed == protocol.TRIAL_SEED:
            raise ValueError(
                f"`seed` = {cell.seed} is that of trials; take another for results"
            )


def check_numbers(tunings: Iterable[Tuning]) -> None:
    """Raise `ValueError` if some cells have more trials than others, or two tables."""
    tunings = list(tunings)
    fields = {name for tuning in tunings for name in tuning.fields}
    nothing: dict[str, Any] = dict.fromkeys(fields)
    same = Counter(
        dataclasses.replace(cell, **nothing)
        for tuning in tunings
        for cell in tuning.cells
    )
    if same and max(same.values()) > 1:
        (cell, _), *_ = same.most_common(1)
        raise ValueError(
            f"`tune`: two matrices have trials for the same cells of {cell.method!r} "
            f"on {cell.task!r}; name all values in one"
        )
    numbers = {len(tuning.trials) for tuning in tunings}
    if len(numbers) > 1:
        shown = " and ".join(map(str, sorted(numbers)))
        raise ValueError(
            f"`tune`: matrices with {shown} values to try; methods are compared with "
            "equally many, so give each the same number"
        )


def tunings_of(
    cells: Sequence[Cell], tune: Mapping[str, Sequence[Value]]
) -> list[Tuning]:
    """Return the tunings of a matrix, in the order of its cells.

    Args:
        cells: the cells of the matrix, with any values of the fields to try.
        tune: values to try by the name of a field; all combinations are tried.
    """
    names = tuple(tune)
    points: list[dict[str, Any]] = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*tune.values())
    ]
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        waiting = dataclasses.replace(cell, **points[0])
        trial = dataclasses.replace(
            waiting, seed=protocol.TRIAL_SEED, scored_on="validation"
        )
        groups.setdefault(trial, []).append(waiting)
    return [
        Tuning(
            fields=names,
            trials=tuple(dataclasses.replace(trial, **point) for point in points),
            cells=tuple(waiting),
        )
        for trial, waiting in groups.items()
    ]


def best_of(tuning: Tuning, records: Mapping[Cell, Record]) -> Cell | None:
    """Return the trial with the best score; None if no trial has one.

    Args:
        tuning: the trials, and the cells that wait for them.
        records: the records of cells that ended.
    """
    best, most = None, float("-inf")
    for trial in tuning.trials:
        record = records.get(trial)
        if record is None or record.status != Status.OK:
            continue
        score, losses = record.measurement.score, record.measurement.loss_curve
        is_finite = None not in (losses or [])  # else it has diverged
        if score is not None and is_finite and score > most:
            best, most = trial, score
    return best
