"""Checkpointing in segments: save the input of every n-th block (Chen et al., 2016).

    n = round(sqrt(L))   of L blocks

Backward recomputes the n blocks of a segment together, so that about 2 sqrt(L) times
what checkpointing keeps for one block exists at a time, and not L times. What a segment
keeps while it is differentiated are the activations inside n blocks.

A model calls its blocks one by one. A block that is not the last of its segment only
notes how it was called and returns its input; the last one runs all of them.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from meft.backbone.family import Family
from meft.backbone.find import BlockList, find_blocks
from meft_bench.child.methods.full import full
from meft_bench.child.methods.lora import lora
from meft_bench.shared.cell import Cell


def segments(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning with segments of blocks checkpointed."""
    return _in_segments(full, model, cell)


def lora_segments(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA with segments of blocks checkpointed."""
    return _in_segments(lora, model, cell)


def _in_segments(
    method: Callable[[PreTrainedModel, Cell], PreTrainedModel],
    model: PreTrainedModel,
    cell: Cell,
) -> PreTrainedModel:
    model = method(model, cell)
    for found in find_blocks(model):
        if reason := _why_not(found):
            raise ValueError(
                f"method {cell.method!r} with {type(model).__name__}, {reason}: take "
                "'checkpointing', or 'lora-checkpointing'"
            )
        size = max(1, round(math.sqrt(len(found.blocks))))
        parts: list[nn.Module] = []
        for start in range(0, len(found.blocks), size):
            segment = Segment()
            for block in found.blocks[start : start + size]:
                parts.append(SegmentBlock(block, found.family, segment))
        setattr(found.owner, found.attribute, nn.ModuleList(parts))
    return model


def _why_not(found: BlockList) -> str:
    """Return why several blocks cannot run in one call; "" if they can."""
    if found.family.extra_outputs is not None:
        return "whose blocks pass more than hidden states to the next"
    if len(found.listed) != len(found.blocks):
        return "which calls a block several times"
    if found.family.prefix(found.config):
        return "which changes hidden states between blocks"
    return ""


class Segment:
    """Blocks that are recomputed together, and the calls that were noted."""

    def __init__(self) -> None:
        self.blocks: list[nn.Module] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


class SegmentBlock(nn.Module):
    """A block of a segment, the last of which runs all of it."""

    def __init__(self, block: nn.Module, family: Family, segment: Segment) -> None:
        super().__init__()
        self.block = block
        self.family = family
        self._segment = segment
        self._index = len(segment.blocks)
        segment.blocks.append(block)
        if hasattr(block, "attention_type"):  # read by the loop of ModernBERT
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the segment's output in its last block, else `hidden`."""
        segment = self._segment
        calls = [*segment.calls[: self._index], (args, kwargs)]
        if self._index + 1 < len(segment.blocks):
            segment.calls = calls
            return self.family.layout(self.block).returned(hidden)
        segment.calls = []
        found = checkpoint(_run, segment.blocks, calls, hidden, use_reentrant=False)
        return self.family.layout(self.block).returned(found)


def _run(
    blocks: list[nn.Module],
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
    hidden: Tensor,
) -> Tensor:
    for block, (args, kwargs) in zip(blocks, calls, strict=True):
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden
