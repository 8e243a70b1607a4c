"""Digits: images of handwritten digits, 8 by 8 grey pixels, in scikit-learn
(Alpaydin and Kaynak, 1998).

There is no official split of these rows, which are the test set of a larger one: the
last fifth, by other writers than most of the first rows, is scored.
"""

from meft_bench.shared.tasks.facts import IMAGES, Facts, Package, Splits

FACTS = Facts(
    name="digits",
    title="Digits",
    asks="which digit is in an image",
    kind=IMAGES,
    fields=("image",),
    labels=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="CC BY 4.0",
    ways=(
        Package(
            name="scikit-learn",
            install="scikit-learn",
            read="digits:of_package",
            splits=Splits(
                train="rows, the first of all",
                evaluation="rows, the last of all; there is no official split",
            ),
        ),
    ),
)
