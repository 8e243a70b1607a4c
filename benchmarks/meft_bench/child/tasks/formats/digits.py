"""scikit-learn's digits, whose gray values are from 0 to 16.

of_package    its rows in their order, the last of them to score with
"""

from meft_bench.child.tasks.rows import SplitRows
from meft_bench.shared.tasks.facts import Package

NUM_TRAIN = 1_437
"""Number of rows to train with."""
LARGEST = 16


def of_package(way: Package) -> SplitRows:
    """Return the rows of `sklearn.datasets.load_digits`.

    Args:
        way: the way.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * 255 / LARGEST).round().astype("uint8")
    rows = [
        {"image": image, "label": label}
        for image, label in zip(images, found.target.tolist(), strict=True)
    ]
    return SplitRows(train=rows[:NUM_TRAIN], evaluation=rows[NUM_TRAIN:])
