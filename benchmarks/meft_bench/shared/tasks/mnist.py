"""MNIST: images of handwritten digits, 28 by 28 grey pixels (LeCun et al., 1998)."""

from meft_bench.shared.tasks.facts import (
    IMAGES,
    OFFICIAL_TEST,
    DataFiles,
    Facts,
    Hub,
    Splits,
)

FACTS = Facts(
    name="mnist",
    title="MNIST",
    asks="which digit is in an image",
    kind=IMAGES,
    fields=("image",),
    labels=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="CC BY-SA 3.0",
    ways=(
        DataFiles(
            folder="mnist",
            names=(
                "train-images-idx3-ubyte",
                "train-labels-idx1-ubyte",
                "t10k-images-idx3-ubyte",
                "t10k-labels-idx1-ubyte",
            ),
            read="idx:both",
            splits=OFFICIAL_TEST,
        ),
        DataFiles(
            folder="mnist-10k",
            names=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
            read="idx:test_only",
            splits=Splits(
                train="official test rows, the first of all, not train rows",
                evaluation="official test rows, the last of all",
            ),
        ),
        Hub(
            name="ylecun/mnist",
            evaluation="test",
            read="idx:hub_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
