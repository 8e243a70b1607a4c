"""Ladder side-tuning: a small network next to a frozen one (Sung et al., NeurIPS 2022).

    s_0 = D_0 h_0,   s_i = block_i(m_i D_i h_i + (1 - m_i) s_{i-1}),
    m_i = sigmoid(a_i / T)

h_i are the hidden states of the backbone, which runs without gradients, D_i makes them
narrow, and U s_L takes the place of h_L. The blocks are of the class of the backbone's
and narrower by the same factor, which divides the heads of attention. They begin with
random weights; the authors also begin with pruned ones.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meft.backbone.find import BlockList, find_blocks
from meft.backbone.heads import freeze_all_but_head
from meft.bottleneck import wide_dtype
from meft_bench.shared.cell import Cell

MOST = 8
"""Largest factor by which the side network is narrower, the authors'."""
TEMPERATURE = 0.1
"""T of the gates."""
_WIDTHS = ("hidden_size", "intermediate_size", "ffn_dim", "num_attention_heads")
"""Names of sizes in configs, all of which become smaller."""
_OF_CACHES = ("past_key_values", "cache", "use_cache", "layer_past", "past_key_value")
"""Arguments of blocks that belong to the backbone's keys and values."""
_WIDE = ("alibi", "position_bias", "rel_embeddings")
"""Arguments that have a number for each head, or the width, of the backbone."""


def ladder(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train a side network and the new head.

    Raises:
        ValueError: the blocks cannot be made narrower.
    """
    found, *others = find_blocks(model)
    factor = _factor(found.config)
    reasons = {
        "has two lists of blocks": bool(others),
        "calls a block several times": len(found.listed) != len(found.blocks),
        "has heads that cannot be divided": factor is None,
    }
    reason = next((words for words, holds in reasons.items() if holds), "")
    if factor is None or reason:
        raise ValueError(
            f"method {cell.method!r} with {type(model).__name__}, which {reason}: take "
            "a model of one stack, or 'adapters'"
        )
    freeze_all_but_head(model)
    side = Side(found, factor)
    side.apply(model._init_weights)
    first = next(found.blocks[0].parameters())
    side.to(first.device, wide_dtype(first.dtype))
    rungs = nn.ModuleList(Rung(block, i, side) for i, block in enumerate(found.blocks))
    setattr(found.owner, found.attribute, rungs)
    model.add_module("ladder_side", side)
    with_ladder: Any = model
    if hasattr(model, "generate"):
        with_ladder.generate = _without_cache(with_ladder.generate)
    return model


def _without_cache(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `generate` for a side network, which keeps no keys and values."""

    def slowly(*args: Any, **options: Any) -> Any:
        return generate(*args, **{**options, "use_cache": False})

    return slowly


class Side(nn.Module):
    """The side network.

    Args:
        found: the blocks of the backbone.
        factor: by which its blocks are narrower.
    """

    def __init__(self, found: BlockList, factor: int) -> None:
        super().__init__()
        shape = found.family.adapter_shape(found.blocks[0], found.config)
        config, width = _narrow(found.config, factor), shape.hidden_size // factor
        number = len(found.blocks)
        self.blocks = nn.ModuleList(
            _made(type(block), config, i) for i, block in enumerate(found.blocks)
        )
        self.down = nn.ModuleList(
            nn.Linear(shape.hidden_size, width) for _ in range(number + 1)
        )
        self.gates = nn.Parameter(torch.zeros(number))
        self.up = nn.Linear(width, shape.hidden_size)
        self.last: Tensor | None = None
        """s_{i-1} of the forward in progress."""

    def climb(self, index: int, hidden: Tensor, output: Tensor, call: Any) -> Tensor:
        """Run block `index` of the side network.

        Args:
            index: number of the block.
            hidden: what the block of the backbone was given, `batch seq hidden`.
            output: what it returned, of the same shape.
            call: its other arguments, by name.

        Returns:
            `output`, or U s_L after the last block.
        """
        dtype = self.up.weight.dtype
        if index == 0:
            self.last = self.down[-1](hidden.to(dtype))
        assert self.last is not None
        gate = torch.sigmoid(self.gates[index] / TEMPERATURE)
        mixed = gate * self.down[index](output.to(dtype)) + (1 - gate) * self.last
        found = self.blocks[index](mixed, **call)
        self.last = found[0] if isinstance(found, tuple) else found
        if index + 1 < len(self.blocks):
            return output
        top: Tensor = self.up(self.last).to(output.dtype)
        self.last = None
        return top


class Rung(nn.Module):
    """A frozen block, and after it the block of the side network."""

    def __init__(self, block: nn.Module, index: int, side: Side) -> None:
        super().__init__()
        self.block = block
        self.index = index
        self._side = [side]  # which is a module of the model, and not of each block
        self._names = list(inspect.signature(block.forward).parameters)[1:]
        if hasattr(block, "attention_type"):  # read by loops of transformers
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns, with hidden states `batch seq hidden`."""
        with torch.no_grad():
            found = self.block(hidden, *args, **kwargs)
        call = dict(zip(self._names, args, strict=False)) | kwargs
        call = {name: v for name, v in call.items() if name not in _OF_CACHES}
        wide = [name for name in _WIDE if call.get(name) is not None]
        if wide:
            raise ValueError(
                f"method 'lst' with {type(self.block).__name__}, which is given "
                f"`{wide[0]}` of the size of the backbone: take a model with other "
                "positions, or 'adapters'"
            )
        is_tuple = isinstance(found, tuple)
        output = found[0] if is_tuple else found
        (side,) = self._side
        top = side.climb(self.index, hidden, output, call)
        return (top, *found[1:]) if is_tuple else top


def _factor(config: Any) -> int | None:
    """Return the largest factor that divides the heads; None if there is none."""
    heads = getattr(config, "num_attention_heads", 1)
    fits = [n for n in range(2, MOST + 1) if heads % n == 0]
    return fits[-1] if fits else None


def _narrow(config: Any, factor: int) -> Any:
    """Return the config of the side network, whose heads are as wide as before."""
    narrow = copy.deepcopy(config)
    for name in _WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(narrow, name, getattr(config, name) // factor)
    groups = getattr(config, "num_key_value_heads", None)
    if groups is not None:
        heads = narrow.num_attention_heads
        narrow.num_key_value_heads = heads if heads % groups else groups
        if groups >= factor and groups % factor == 0:
            narrow.num_key_value_heads = groups // factor
    return narrow


def _made(kind: type[nn.Module], config: Any, index: int) -> nn.Module:
    """Make one block, whose class may take its number."""
    takes_number = "layer_idx" in inspect.signature(kind.__init__).parameters
    return kind(config, layer_idx=index) if takes_number else kind(config)
