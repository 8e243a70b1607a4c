"""Metrics of the tasks, as `evaluate.Metric` classes that need no network.

`evaluate.load` would download the same few lines from the hub. The first value of each
metric is the score, by which weights are selected; a task whose metric has a second
value reports it in addition. Classes are scored by scikit-learn, numbers by scipy.
"""

import math
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from meft_bench.child.own import metric as own_metric


class _LabelMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of predicted against true class labels."""

    def _info(self) -> evaluate.MetricInfo:
        labels = {"predictions": Value("int64"), "references": Value("int64")}
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: integer labels",
            features=Features(labels),
        )


class Accuracy(_LabelMetric):
    """Fraction of labels that are right."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class AccuracyAndF1(_LabelMetric):
    """Fraction of labels that are right, and F1 of label 1."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1": float(f1_score(references, predictions, zero_division=0.0)),
        }


class MatthewsCorrelation(_LabelMetric):
    """Matthews' correlation coefficient, 0 for any constant answer."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {
            "matthews_correlation": float(matthews_corrcoef(references, predictions))
        }


class PearsonAndSpearman(evaluate.Metric):  # type: ignore[misc]
    """Pearson's correlation with the true numbers, and Spearman's, that of the ranks.

    Both are not-a-number where all predictions, or all true numbers, are equal, as in
    the official metric.
    """

    def _info(self) -> evaluate.MetricInfo:
        numbers = {"predictions": Value("float64"), "references": Value("float64")}
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: numbers",
            features=Features(numbers),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if len(predictions) < 2:
            return {"pearson": math.nan, "spearman": math.nan}
        return {
            "pearson": float(pearsonr(predictions, references)[0]),
            "spearman": float(spearmanr(predictions, references)[0]),
        }


METRICS: dict[str, Any] = {
    "accuracy": Accuracy,
    "accuracy_and_f1": AccuracyAndF1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson_and_spearman": PearsonAndSpearman,
}


def scores(
    metric: str, predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    """Return every value of the metric of that name, the score first.

    Args:
        metric: one of `METRICS`, or of the user.
        predictions: predicted labels, or numbers.
        references: the true ones, in the same order.
    """
    if own_metric.is_own(metric):
        return own_metric.scores(metric, predictions, references)
    # The shared cache directory cannot be used, because cells run in parallel.
    with tempfile.TemporaryDirectory() as directory:
        scorer = METRICS[metric](cache_dir=directory, keep_in_memory=True)
        # Of a single class and of numbers that are all equal, whose scores are defined
        # above.
        with warnings.catch_warnings(action="ignore"):
            values: dict[str, float] = scorer.compute(
                predictions=predictions, references=references
            )
    return values
