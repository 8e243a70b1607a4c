"""Images in the format of MNIST's files: a header of big-endian numbers, then bytes.

2 bytes 0, 1 byte type (8: unsigned bytes), 1 byte number of axes,
4 bytes for the length of each axis, the values

both        files of training and of test images
test_only   files of test images, some of which train
hub_row     a row of the hub
"""

import math
from typing import Any

import numpy
from numpy.typing import NDArray

from meft_bench.child.tasks.rows import Content, RowDict, SplitRows
from meft_bench.shared.tasks.facts import DataFiles

NUM_TRAIN = 8_000
"""Number of test images to train with where there are no others."""
_UNSIGNED_BYTES = 8


def both(
    way: DataFiles,
    train_images: Content,
    train_labels: Content,
    test_images: Content,
    test_labels: Content,
) -> SplitRows:
    """Return the rows of files of training and of test images.

    Args:
        way: the way.
        train_images: the images to train with.
        train_labels: their classes.
        test_images: the images to score with.
        test_labels: their classes.
    """
    return SplitRows(
        train=_rows(train_images, train_labels),
        evaluation=_rows(test_images, test_labels),
    )


def test_only(way: DataFiles, images: Content, labels: Content) -> SplitRows:
    """Return the rows of files of test images, the first of them to train with.

    Args:
        way: the way.
        images: the images.
        labels: their classes.
    """
    rows = _rows(images, labels)
    return SplitRows(train=rows[:NUM_TRAIN], evaluation=rows[NUM_TRAIN:])


def hub_row(row: dict[str, Any]) -> RowDict:
    """Return a row of the hub, whose image is one of Pillow's."""
    return {"image": numpy.asarray(row["image"], numpy.uint8), "label": row["label"]}


def _rows(images: Content, labels: Content) -> list[RowDict]:
    pixels, classes = _array(images, axes=3), _array(labels, axes=1)
    if len(pixels) != len(classes):
        raise ValueError(
            f"{labels.path}: {len(classes)} labels, expected {len(pixels)}, one for "
            f"each image of {images.path.name}"
        )
    return [
        {"image": image, "label": label}
        for image, label in zip(pixels, classes.tolist(), strict=True)
    ]


def _array(content: Content, axes: int) -> NDArray[numpy.uint8]:
    begin = 4 + 4 * axes
    header = content.data[:begin]
    shape = tuple(int.from_bytes(header[i : i + 4]) for i in range(4, begin, 4))
    values = content.data[begin:]
    is_idx = header[:4] == bytes([0, 0, _UNSIGNED_BYTES, axes])
    if not is_idx or math.prod(shape) != len(values):
        raise ValueError(
            f"{content.path}: not a whole IDX file of bytes with {axes} axes: "
            f"it begins with {header[:4].hex()} and has {len(values)} values"
        )
    return numpy.frombuffer(values, numpy.uint8).reshape(shape)
