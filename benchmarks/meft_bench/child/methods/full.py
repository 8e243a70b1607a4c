"""Two reference methods: train all parameters, or only the new head."""

from transformers import PreTrainedModel

from meft.backbone.heads import freeze_all_but_head
from meft_bench.child.backbones import heads_of
from meft_bench.shared.cell import Cell


def full(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning: every parameter is trained."""
    model.requires_grad_(True)
    return model


def head(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train the new head; the backbone, including a pooler, is frozen.

    Raises:
        ValueError: the model is a language model, which has no new head.
    """
    if not heads_of(model):
        raise ValueError(
            f"method 'head' trains a new head, and for task {cell.task!r} a model "
            "keeps the one it has: take another method, or a task of labels"
        )
    freeze_all_but_head(model)
    return model
