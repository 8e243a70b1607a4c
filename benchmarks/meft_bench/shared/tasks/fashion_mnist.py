"""Fashion-MNIST: images of clothes, 28 by 28 grey pixels (Xiao et al., 2017).

The Debian package `dataset-fashion-mnist` has the files in `/usr/share/datasets`, which
can be the data directory.
"""

from meft_bench.shared.tasks.facts import (
    IMAGES,
    OFFICIAL_TEST,
    DataFiles,
    Facts,
    Hub,
    Splits,
)

FACTS = Facts(
    name="fashion-mnist",
    title="Fashion-MNIST",
    asks="which of ten kinds of clothes is in an image",
    kind=IMAGES,
    fields=("image",),
    labels=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    metric="accuracy",
    protocol="accuracy over all rows",
    licence="MIT",
    ways=(
        DataFiles(
            folder="fashion-mnist",
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
            folder="fashion-mnist",
            names=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
            read="idx:test_only",
            splits=Splits(
                train="official test rows, the first of all, not train rows",
                evaluation="official test rows, the last of all",
            ),
        ),
        Hub(
            name="zalando-datasets/fashion_mnist",
            evaluation="test",
            read="idx:hub_row",
            splits=OFFICIAL_TEST,
        ),
    ),
)
