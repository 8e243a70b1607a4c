"""Gradient checkpointing: keep each block's input, run the block again in backward.

The plain rival of a reversible stack: the same extra forward, with one tensor kept per
block where MEFT keeps two in all. The non-reentrant form, so that a frozen embedding
below does not cut off the gradient.
"""

from transformers import BertForSequenceClassification

from meft_bench.cell import Cell
from meft_bench.methods.full import full
from meft_bench.methods.lora import lora


def checkpointing(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """Full fine-tuning with every block checkpointed."""
    return _checkpointed(full(model, cell))


def lora_checkpointing(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """LoRA with every block checkpointed."""
    return _checkpointed(lora(model, cell))


def _checkpointed(
    model: BertForSequenceClassification,
) -> BertForSequenceClassification:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
