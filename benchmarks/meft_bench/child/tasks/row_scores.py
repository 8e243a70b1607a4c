"""What each row contributes to a score that is not a mean over rows.

The jackknife's pseudo-value of row i, of n rows (Tukey, 1958):

    n · score - (n - 1) · score without row i

Their mean is close to the score, and their spread is that of the score over rows, so
that intervals of correlations can be computed as those of accuracies are. For a mean
over rows, a pseudo-value is the value of the row itself.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef

Values = Sequence[float]
DIGITS = 6
"""Number of decimals that are kept."""


def row_scores(
    metric: str, predictions: Values, references: Values
) -> list[float] | None:
    """Return the pseudo-value of each row; None for a metric that has none.

    None is also returned if the score is undefined, with all rows or without one.

    Args:
        metric: name of a metric, see `metrics.METRICS`.
        predictions: predicted labels, or numbers.
        references: the true ones, in the same order.
    """
    if metric not in WITHOUT_ROW or len(predictions) < 3:
        return None
    # Of numbers that are all equal, whose score is undefined.
    with warnings.catch_warnings(action="ignore"):
        score, without = WITHOUT_ROW[metric](predictions, references)
    count = len(predictions)
    values = [count * score - (count - 1) * one for one in without]
    if not all(map(math.isfinite, values)):
        return None
    return [round(value, DIGITS) for value in values]


def _matthews(predictions: Values, references: Values) -> tuple[float, list[float]]:
    """Return the score, and the score without each row.

    Rows with the same two labels are alike, so there are few different ones.
    """
    rows = np.stack([np.asarray(references), np.asarray(predictions)])
    _, firsts, kind_of_row = np.unique(
        rows, axis=1, return_index=True, return_inverse=True
    )
    of_kind = [float(matthews_corrcoef(*np.delete(rows, i, axis=1))) for i in firsts]
    score = float(matthews_corrcoef(*rows))
    return score, [of_kind[kind] for kind in kind_of_row.reshape(-1)]


def _pearson(predictions: Values, references: Values) -> tuple[float, list[float]]:
    """Return the score, and the score without each row.

    With x and y less their means, leaving out row i changes their sums of squares and
    products by n / (n - 1) times those of the row.
    """
    x, y = (np.asarray(v) - np.mean(v) for v in (predictions, references))
    share = len(x) / (len(x) - 1)
    squares, others = x @ x - share * x * x, y @ y - share * y * y
    with np.errstate(all="ignore"):
        without = (x @ y - share * x * y) / np.sqrt(squares * others)
    return float(pearsonr(predictions, references)[0]), without.tolist()


WITHOUT_ROW: dict[str, Callable[[Values, Values], tuple[float, list[float]]]] = {
    "matthews_correlation": _matthews,
    "pearson_and_spearman": _pearson,
}
"""Metrics whose score is not a mean over rows."""
