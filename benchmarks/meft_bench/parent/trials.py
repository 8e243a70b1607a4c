"""Trials: values of fields that scores on rows set aside choose, for each method.

A matrix can declare values to try, `tune`, such as several learning rates. For
every method on every task, with every option, there is one trial for each value, or for
each value and seed where the matrix has several `trial_seeds`:

    trial      seed `protocol.TRIAL_SEED`, or one of the next, scored on the rows set
               aside (`scored_on`)
    cell       the seeds of the matrix, the value of the best trial, scored as usual

If the best learning rate is the smallest or the largest that was tried, a matrix with
`trial_extensions` tries one beyond it, as many times at most, by the same factor as
between the two at that end.

The rows of evaluation therefore choose nothing, all methods have equally many trials or
more by the same rule, and trials are records like others. The mean over seeds counts.
Of equal scores, the second and the third score decide, then the first value is taken. A
value of which a trial failed or diverged does not count; where none is left, the cells
are not run.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meft_bench.shared import methods, protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.record import Record, Status

RATE = "learning_rate"
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
    extensions: int = 0
    """Number of values that may still be added to those tried."""

    def cells_with(self, best: Cell) -> tuple[Cell, ...]:
        """Return the cells with the values of a trial."""
        values: dict[str, Any] = {name: getattr(best, name) for name in self.fields}
        return tuple(dataclasses.replace(cell, **values) for cell in self.cells)


def check(
    tune: Mapping[str, Sequence[Value]],
    cells: Iterable[Cell],
    num_seeds: int = 1,
    num_extensions: int = 0,
) -> None:
    """Raise `ValueError` if values cannot be tried with some cells.

    Args:
        tune: values to try by the name of a field.
        cells: the cells of the matrix, with any of the values.
        num_seeds: number of trials of each value.
        num_extensions: number of further values to try at most.
    """
    if num_extensions and [*tune] != [RATE]:
        given = f"`tune` names {' and '.join(tune)}" if tune else "there is no `tune`"
        raise ValueError(
            f"`trial_extensions` = {num_extensions} is for trials of `{RATE}` alone, "
            f"but {given}: leave it out, or try rates"
        )
    if not tune:
        if num_seeds != 1:
            raise ValueError(
                f"`trial_seeds` = {num_seeds} without `tune`: name values to try, or "
                "leave it out"
            )
        return
    seeds = range(protocol.TRIAL_SEED, protocol.TRIAL_SEED + num_seeds)
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
        if cell.seed in seeds:
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
    for words, numbers in (
        ("values to try", {len(tuning.trials) for tuning in tunings}),
        ("`trial_extensions`", {tuning.extensions for tuning in tunings}),
    ):
        if len(numbers) > 1:
            shown = " and ".join(map(str, sorted(numbers)))
            raise ValueError(
                f"`tune`: matrices with {shown} {words}; methods are compared with "
                "equally many, so give each the same number"
            )


def tunings_of(
    cells: Sequence[Cell],
    tune: Mapping[str, Sequence[Value]],
    num_seeds: int = 1,
    num_extensions: int = 0,
) -> list[Tuning]:
    """Return the tunings of a matrix, in the order of its cells.

    Args:
        cells: the cells of the matrix, with any values of the fields to try.
        tune: values to try by the name of a field; all combinations are tried.
        num_seeds: number of trials of each combination, with a seed each.
        num_extensions: number of further values to try at most.
    """
    names = tuple(tune)
    points: list[dict[str, Any]] = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*tune.values())
    ]
    seeds = range(protocol.TRIAL_SEED, protocol.TRIAL_SEED + num_seeds)
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        waiting = dataclasses.replace(cell, **points[0])
        trial = dataclasses.replace(waiting, seed=seeds[0], scored_on="validation")
        groups.setdefault(trial, []).append(waiting)
    return [
        Tuning(
            fields=names,
            trials=tuple(
                dataclasses.replace(trial, seed=seed, **point)
                for point in points
                for seed in seeds
            ),
            cells=tuple(waiting),
            extensions=num_extensions,
        )
        for trial, waiting in groups.items()
    ]


def best_of(tuning: Tuning, records: Mapping[Cell, Record]) -> Cell | None:
    """Return the first trial of the values with the best scores; None if none has one.

    Args:
        tuning: the trials, and the cells that wait for them.
        records: the records of cells that ended.
    """
    by_values: dict[Cell, list[Cell]] = {}
    for trial in tuning.trials:
        first = dataclasses.replace(trial, seed=tuning.trials[0].seed)
        by_values.setdefault(first, []).append(trial)
    best, most = None, (float("-inf"),) * len(_SCORES)
    for first, its in by_values.items():
        found = [_scores(records.get(trial)) for trial in its]
        known = [scores for scores in found if scores is not None]
        if len(known) < len(found):
            continue
        # Rounded, as sums of equal shares of rows differ in their last bits.
        means = tuple(
            round(sum(values) / len(known), _DIGITS)
            for values in zip(*known, strict=True)
        )
        if means > most:
            best, most = first, means
    return best


def grown(
    tunings: Sequence[Tuning],
    find: Callable[[Sequence[Cell]], Mapping[Cell, Record]],
) -> tuple[Tuning, ...]:
    """Return tunings with the further values that ended trials ask for.

    Args:
        tunings: the tunings of a sweep.
        find: returns the records of those cells that have ended, well or not.

    Returns:
        The tunings. Those with trials that have not ended are as they are.
    """
    found = tuple(tunings)
    while True:
        ended = find([trial for tuning in found for trial in tuning.trials])
        longer = tuple(_extended(tuning, ended) for tuning in found)
        if longer == found:
            return found
        found = longer


def _extended(tuning: Tuning, ended: Mapping[Cell, Record]) -> Tuning:
    """Return a tuning with one more value, if the best one is at an end."""
    is_whole = all(trial in ended for trial in tuning.trials)
    best = best_of(tuning, ended) if tuning.extensions and is_whole else None
    if best is None:
        return tuning
    tried = sorted({trial.learning_rate for trial in tuning.trials})
    nearest = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best.learning_rate)
    if nearest is None:
        return tuning
    rates = (
        float(f"{best.learning_rate * best.learning_rate / nearest:.{digits}g}")
        for digits in (2, 6)
    )
    rate = next((rate for rate in rates if not tried[0] <= rate <= tried[-1]), None)
    if rate is None:  # values that are almost equal
        return tuning
    seeds = dict.fromkeys(trial.seed for trial in tuning.trials)
    further = (
        dataclasses.replace(best, seed=seed, learning_rate=rate) for seed in seeds
    )
    return dataclasses.replace(
        tuning,
        trials=(*tuning.trials, *further),
        extensions=tuning.extensions - 1,
    )


_SCORES = ("score", "second_score", "third_score")
_DIGITS = 12


def _scores(record: Record | None) -> tuple[float, ...] | None:
    """Return the scores of a trial; None if it has none, or has diverged."""
    if record is None or record.status != Status.OK:
        return None
    is_finite = None not in (record.measurement.loss_curve or [])
    if record.measurement.score is None or not is_finite:
        return None
    found = (getattr(record.measurement, name) for name in _SCORES)
    return tuple(float("-inf") if value is None else value for value in found)
