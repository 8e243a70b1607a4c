"""Gradient checkpointing: save each block's input, recompute the block in backward.

This is the plain counterpart of a reversible stack: it has the same extra forward, but
saves one tensor per block where MEFT saves two in total. transformers' own switch does
the same and more: it makes the embedding's output require a gradient, which is not
needed for a frozen backbone with the non-reentrant form and would add cost.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from meft.backbone.find import find_blocks
from meft_bench.child.methods.adapters import adapters
from meft_bench.child.methods.full import full
from meft_bench.child.methods.lora import lora
from meft_bench.shared.cell import Cell

Method = Callable[[PreTrainedModel, Cell], PreTrainedModel]


def checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning with every block checkpointed."""
    return _checkpointed(full, model, cell)


def lora_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA with every block checkpointed."""
    return _checkpointed(lora, model, cell)


def adapters_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply adapters with every block checkpointed."""
    return _checkpointed(adapters, model, cell)


def _checkpointed(
    method: Method, model: PreTrainedModel, cell: Cell
) -> PreTrainedModel:
    # Found first, because the method may replace the blocks in these lists.
    lists = find_blocks(model)
    model = method(model, cell)
    for found in lists:
        blocks = map(CheckpointedBlock, getattr(found.owner, found.attribute))
        setattr(found.owner, found.attribute, nn.ModuleList(blocks))
    return model


class CheckpointedBlock(nn.Module):
    """A block that saves only its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        if hasattr(block, "attention_type"):  # read by the loop of ModernBERT
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output: `batch seq hidden`, or a tuple with it."""
        return checkpoint(self.block, hidden, *args, use_reentrant=False, **kwargs)
