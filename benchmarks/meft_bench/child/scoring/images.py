"""Classifiers of images: the label with the largest logit, as for those of texts."""

from meft_bench.child.scoring.examples import Examples
from meft_bench.child.scoring.labels import (
    is_right,
    majority,
    predict,
    row_scores,
    scores,
)
from meft_bench.child.tasks.batches import Image, PixelForm
from meft_bench.child.tasks.task import Picture, Task
from meft_bench.shared.cell import Cell

__all__ = ["examples", "is_right", "majority", "predict", "row_scores", "scores"]


def examples(task: Task, form: PixelForm, cell: Cell) -> Examples:
    """Return all images with the form to which batches convert them.

    Args:
        task: the images.
        form: the images that the model reads.
        cell: the cell; unused.
    """
    train, validation, evaluation = (
        [
            Image(pixels=row.pixels, label=row.label, form=form)
            for row in rows
            if isinstance(row, Picture)
        ]
        for rows in (task.train, task.validation, task.evaluation)
    )
    return Examples(train=train, validation=validation, evaluation=evaluation)
