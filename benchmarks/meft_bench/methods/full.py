"""The two ends of the range: train everything, or only the new head."""

from transformers import BertForSequenceClassification

from meft_bench.cell import Cell


def full(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """Full fine-tuning: every parameter trains."""
    return model.requires_grad_(True)


def head(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """The new classifier trains; the backbone, its pooler included, is frozen."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model
