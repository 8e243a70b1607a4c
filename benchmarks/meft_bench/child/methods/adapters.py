"""Bottleneck adapters under ordinary autograd, the plain counterpart of MEFT3.

The adapters and their positions are those of MEFT3, in an ordinary stack:

    a = attention_half(x, adapter),   out = mlp_half(a, adapter)

with the halves of the library, which `meft.backbone` describes: one adapter follows
attention, sequentially with its own skip connection, and one is parallel to the
feed-forward, on the same input. In a block whose halves are parallel, both read the
input of the block. A difference between the two methods is therefore due
to the reversible stack only.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from meft.backbone.family import AdapterShape, Family
from meft.backbone.find import find_blocks
from meft.backbone.heads import freeze_all_but_head
from meft.bottleneck import Bottleneck, wide_dtype
from meft_bench.shared.cell import Cell


def adapters(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train two adapters per block, and the new head."""
    freeze_all_but_head(model)
    for found in find_blocks(model):
        adapted = nn.ModuleList()
        for block in found.blocks:
            shape = found.family.adapter_shape(block, found.config)
            pair = _bottleneck(shape, cell), _bottleneck(shape, cell)
            adapted.append(AdaptedBlock(block, found.family, *pair))
        setattr(found.owner, found.attribute, adapted)
    return model


class AdaptedBlock(nn.Module):
    """A block of any family as two halves, each with an adapter or without."""

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        attention_adapter: nn.Module | None,
        mlp_adapter: nn.Module | None,
    ) -> None:
        super().__init__()
        weight = next(block.parameters())
        self.block = block
        self.attention_adapter = attention_adapter
        self.mlp_adapter = mlp_adapter
        for adapter in (attention_adapter, mlp_adapter):
            if adapter is not None:
                adapter.to(weight.device, wide_dtype(weight.dtype))
        self.family = family
        # The halves take by name what a model's loop may pass by position.
        self._names = list(inspect.signature(block.forward).parameters)[1:]
        if hasattr(block, "attention_type"):  # read by the loop of ModernBERT
            self.attention_type = block.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output: `batch seq hidden`, or a tuple with it."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        adapters = self.mlp_adapter, self.attention_adapter
        output = self.family.whole(self.block, hidden_states, *adapters, **call)
        return self.family.layout(self.block).returned(output)

    def attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the half that mixes tokens, `batch seq hidden`."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        return self.family.attention_half(
            self.block, hidden_states, self.attention_adapter, **call
        )

    def mlp(self, attended: Tensor) -> Tensor:
        """Return the output of the position-wise half, of the shape of its input."""
        return self.family.mlp_half(self.block, attended, self.mlp_adapter)


def _bottleneck(shape: AdapterShape, cell: Cell) -> Bottleneck:
    return Bottleneck(
        shape.hidden_size,
        cell.bottleneck_size,
        shape.activation,
        shape.dropout,
        shape.std,
    )
