"""The change by a method before any training: the deviation of the starting point.

    |h_method - h_backbone| / |h_backbone|

where h is the last hidden state of a whole batch, which is the input of the head, in
the cell's compute dtype and without dropout. Adapters are included with their initial
weights.
"""

import contextlib

import torch
from torch import Tensor

from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training.steps import Stepper


@torch.no_grad()
def last_hidden(stepper: Stepper, batch: Batch) -> Tensor:
    """Return the last hidden state of the backbone, `batch seq hidden`, in float64."""
    model = stepper.model
    was_training = model.training
    model.eval()
    inputs = {n: t for n, t in stepper.to_device(batch).items() if n != "labels"}
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None:  # BART does so itself, T5 does not
        inputs["decoder_input_ids"] = shifted(inputs["input_ids"])
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    with contextlib.ExitStack() as entered:
        entered.enter_context(stepper.autocast())
        if head is not None:  # T5's language model has no base model
            hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            entered.enter_context(hook)
        output = model.base_model(**inputs)
    model.train(was_training)
    hidden: Tensor = seen[0] if seen else output.last_hidden_state
    return hidden.double()


def deviation(before: Tensor, after: Tensor) -> float:
    """Return the deviation of `after` relative to `before`, over all elements."""
    return float((after - before).norm() / before.norm())
