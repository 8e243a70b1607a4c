"""What a method changes before any training: the deviation of its starting point.

    |h_method - h_backbone| / |h_backbone|

with h the last hidden state of a whole batch, which is what the head reads, in the
cell's compute dtype and without dropout. Adapters are in it as they start out.
"""

import torch
from torch import Tensor

from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training.steps import Stepper


@torch.no_grad()
def last_hidden(stepper: Stepper, batch: Batch) -> Tensor:
    """The last hidden state of the backbone, `batch seq hidden`, float64."""
    model = stepper.model
    was_training = model.training
    model.eval()
    inputs = {n: t for n, t in stepper.to_device(batch).items() if n != "labels"}
    with stepper.autocast():
        hidden: Tensor = model.base_model(**inputs).last_hidden_state
    model.train(was_training)
    return hidden.double()


def deviation(before: Tensor, after: Tensor) -> float:
    """Relative to `before`, over all elements."""
    return float((after - before).norm() / before.norm())
