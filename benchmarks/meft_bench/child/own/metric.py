"""A metric of the user: a function, or a class of `evaluate.Metric`.

    python:MODULE:FUNCTION   called as `function(predictions, references)`; returns a
                             number, or numbers by name
    evaluate:MODULE          the class of `evaluate.Metric` that a module defines

A MODULE is the name of an installed one or the path of a file. The first number is the
score, of which more is better: an error is returned as its negative. Names in records
begin with `own:`, because their range is not known.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meft_bench.child.own import code
from meft_bench.shared.own import EVALUATE, OWN_SCORE, PYTHON

MOST_SCORES = 3
"""Number of scores that a record has."""


def is_own(metric: str) -> bool:
    """Return whether a metric is of the user."""
    return metric.startswith((PYTHON, EVALUATE))


def scores(
    metric: str, predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    """Return every value of a metric of the user, the score first.

    Args:
        metric: `python:...` or `evaluate:...`.
        predictions: classes, numbers, or texts.
        references: the true ones, in the same order; a list of all accepted answers
            where rows have several.

    Raises:
        ValueError: the metric cannot be loaded, fails, or returns anything else than
            numbers.
    """
    call, name = _function(metric)
    try:
        found = call(list(predictions), list(references))
    except Exception as error:  # of any type, in code of the user
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"metric {metric!r} failed: {reason}") from error
    values = found if isinstance(found, Mapping) else {name: found}
    if not 0 < len(values) <= MOST_SCORES:
        raise ValueError(
            f"metric {metric!r} returned {len(values)} values, and a record has 1 to "
            f"{MOST_SCORES}: return the ones to keep"
        )
    return {
        f"{OWN_SCORE}{key}": _number(metric, key, value)
        for key, value in values.items()
    }


def _number(metric: str, key: Any, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"metric {metric!r} returned {value!r:.60} as {key!r}, expected a finite "
            "number"
        )
    return number


def _function(metric: str) -> tuple[Callable[[list[Any], list[Any]], Any], str]:
    """Return what a metric calls, and the name of a number that it returns alone."""
    if metric.startswith(PYTHON):
        return code.load(metric, "metric"), metric.rpartition(":")[2]
    import evaluate

    module = code.import_module(metric.removeprefix(EVALUATE), "metric")
    kinds = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, evaluate.Metric)
        and kind.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise ValueError(
            f"metric {metric!r}: its module defines {len(kinds)} classes of "
            "`evaluate.Metric`, expected one; a function is named as python:FILE.py:"
            "FUNCTION"
        )

    def compute(predictions: list[Any], references: list[Any]) -> Any:
        # The shared cache directory cannot be used, because cells run in parallel.
        with tempfile.TemporaryDirectory() as folder:
            scorer = kinds[0](cache_dir=folder, keep_in_memory=True)
            return scorer.compute(predictions=predictions, references=references)

    return compute, kinds[0].__name__
