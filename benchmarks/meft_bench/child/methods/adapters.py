"""Bottleneck adapters under ordinary autograd, the plain counterpart of MEFT3.

The adapters and their positions are those of MEFT3, in an ordinary stack:

    a = attention_half(x, adapter),   out = mlp_half(a, adapter)

with the halves of the library, which `meft.backbone` describes: one adapter follows
attention, sequentially with its own skip connection, and one is parallel to the
feed-forward, on the same input. In a block whose halves are parallel, both read the
input of the block. A difference between the two methods is therefore due
to the reversible stack only.

The positions of the papers, with the same adapters; u is the output of a sublayer
before its residual connection:

houlsby   u + adapter(u) after attention and after the feed-forward (Houlsby et al.,
          ICML 2019)
pfeiffer  the same after the feed-forward only (Pfeiffer et al., EACL 2021)
parallel  u + adapter(x), where x is the input of the feed-forward (He et al., ICLR
          2022)
"""

import inspect
from collections.abc import Callable, Sequence
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
    return at(["attention_adapter", "mlp_adapter"], model, cell, _bottleneck)


def houlsby(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train an adapter after each half of a block, and the new head."""
    return at(["attention_adapter", "output_adapter"], model, cell, _bottleneck)


def pfeiffer(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train an adapter after each feed-forward, and the new head."""
    return at(["output_adapter"], model, cell, _bottleneck)


def parallel(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train an adapter next to each feed-forward, and the new head."""
    return at(["mlp_adapter"], model, cell, _bottleneck)


def at(
    places: Sequence[str],
    model: PreTrainedModel,
    cell: Cell,
    adapter_of: Callable[[AdapterShape, Cell], nn.Module],
) -> PreTrainedModel:
    """Train adapters and the new head.

    Args:
        places: arguments of `AdaptedBlock`, in the order in which adapters are made.
        model: the model, changed in place.
        cell: the cell, which is passed on.
        adapter_of: makes one adapter.
    """
    freeze_all_but_head(model)
    for found in find_blocks(model):
        adapted = nn.ModuleList()
        for block in found.listed:  # each once, if the model calls it several times
            shape = found.family.adapter_shape(block, found.config)
            made = {place: adapter_of(shape, cell) for place in places}
            adapted.append(AdaptedBlock(block, found.family, **made))
        setattr(found.owner, found.attribute, adapted)
    return model


class AdaptedBlock(nn.Module):
    """A block of any family as two halves, each with adapters or without.

    Args:
        block: the block.
        family: the family that describes it.
        attention_adapter: follows attention.
        mlp_adapter: is parallel to the feed-forward.
        output_adapter: follows the feed-forward.
    """

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        attention_adapter: nn.Module | None = None,
        mlp_adapter: nn.Module | None = None,
        output_adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        weight = next(block.parameters())
        self.block = block
        self.attention_adapter = attention_adapter
        self.mlp_adapter = mlp_adapter
        self.output_adapter = output_adapter
        for adapter in (attention_adapter, mlp_adapter, output_adapter):
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
        adapters = self.mlp_adapter, self.attention_adapter, self.output_adapter
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
        adapters = self.mlp_adapter, self.output_adapter
        return self.family.mlp_half(self.block, attended, *adapters)


def _bottleneck(shape: AdapterShape, cell: Cell) -> Bottleneck:
    return Bottleneck(
        shape.hidden_size,
        cell.bottleneck_size,
        shape.activation,
        shape.dropout,
        shape.std,
    )
