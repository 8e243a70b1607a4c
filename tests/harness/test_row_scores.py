"""What each row contributes to a correlation: held against the metric itself."""

import random
from statistics import fmean

import pytest

from meft_bench.child.tasks.metrics import scores
from meft_bench.child.tasks.row_scores import row_scores

NUM_ROWS = 25


def rows(metric: str, seed: int) -> tuple[list[float], list[float]]:
    draw = random.Random(seed)
    if metric == "pearson_and_spearman":
        true = [draw.gauss(2, 1) for _ in range(NUM_ROWS)]
        return [value + draw.gauss(0, 1) for value in true], true
    classes = 3 if seed else 2
    true = [draw.randrange(classes) for _ in range(NUM_ROWS)]
    wrong = draw.sample(range(NUM_ROWS), 7)
    predicted = [(t + (i in wrong)) % classes for i, t in enumerate(true)]
    return predicted, true


def score(metric: str, predictions: list[float], references: list[float]) -> float:
    return next(iter(scores(metric, predictions, references).values()))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("metric", ["matthews_correlation", "pearson_and_spearman"])
def test_a_row_counts_with_what_the_score_loses_without_it(
    metric: str, seed: int
) -> None:
    """One metric call for each row, against sums and kinds of rows."""
    predicted, true = rows(metric, seed)
    whole = score(metric, predicted, true)
    wanted = [
        NUM_ROWS * whole
        - (NUM_ROWS - 1)
        * score(metric, predicted[:i] + predicted[i + 1 :], true[:i] + true[i + 1 :])
        for i in range(NUM_ROWS)
    ]
    found = row_scores(metric, predicted, true)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert fmean(found or ()) == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_and_f1", "python:m:f"])
def test_shares_of_rows_and_own_metrics_have_none(metric: str) -> None:
    assert row_scores(metric, [0, 1, 1], [0, 1, 0]) is None


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),  # a constant has no correlation
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]),  # nor has what is left without the last
        ([1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_undefined_scores_have_none(
    predictions: list[float], references: list[float]
) -> None:
    assert row_scores("pearson_and_spearman", predictions, references) is None


def test_a_constant_answer_has_no_matthews_correlation_with_any_row() -> None:
    assert row_scores("matthews_correlation", [1] * 4, [0, 1, 1, 0]) == [0.0] * 4
