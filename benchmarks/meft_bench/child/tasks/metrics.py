"""Metrics of the tasks, as `evaluate.Metric` classes that need no network.

`evaluate.load` would download the same few lines from the hub. The first value of each
metric is the score, by which weights are selected; a task whose metric has a second
value reports it in addition.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
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


METRICS = {
    "accuracy": Accuracy,
    "accuracy_and_f1": AccuracyAndF1,
    "matthews_correlation": MatthewsCorrelation,
}


def scores(
    metric: str, predictions: Sequence[int], references: Sequence[int]
) -> dict[str, float]:
    """Return every value of the metric of that name, the score first.

    Args:
        metric: one of `METRICS`, or of the user.
        predictions: predicted labels.
        references: true labels, in the same order.
    """
    if own_metric.is_own(metric):
        return own_metric.scores(metric, predictions, references)
    # The shared cache directory cannot be used, because cells run in parallel.
    with tempfile.TemporaryDirectory() as directory:
        scorer = METRICS[metric](cache_dir=directory, keep_in_memory=True)
        values: dict[str, float] = scorer.compute(
            predictions=predictions, references=references
        )
    return values
