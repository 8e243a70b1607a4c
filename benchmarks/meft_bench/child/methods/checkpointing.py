"""Gradient checkpointing: save each block's input, recompute the block in backward.

This is the plain counterpart of a reversible stack: it has the same extra forward, but
saves one tensor per block where MEFT saves two in total. transformers' own switch does
the same and more: it makes the embedding's output require a gradient, which is not
needed for a frozen backbone with the non-reentrant form and would add cost.

`..._offload` keeps the saved inputs in pinned host memory, as transformers 5.24 can do
by an option of its activation checkpointing: torch's `save_on_cpu` around each
checkpoint, whose copies run on the stream of the computation. Older versions of
transformers do not have this option, so it is written here; every copy is booked.

With `mlp_chunks` above 1, the position-wise layers of a block run and are recomputed in
so many parts of the tokens, each a checkpoint inside that of the block. Their
activations then exist for one part at a time, for one more forward of these layers:
what TiledMLP of Arctic Long Sequence Training does inside a checkpointed block. Norms
of the half that mixes tokens run in parts too, as in a reversible stack.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from meft.backbone.find import BlockList, find_blocks
from meft.backbone.norm_parts import norms_in_parts
from meft.transfer import TransferLedger, TransferTag
from meft_bench.child.methods.adapters import AdaptedBlock, adapters, houlsby
from meft_bench.child.methods.bitfit import bitfit
from meft_bench.child.methods.full import full
from meft_bench.child.methods.lora import dora, lora, lora_all
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


def checkpointing_offload(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply full fine-tuning with every block checkpointed, its input on the host."""
    return _checkpointed(full, model, cell, offload=True)


def lora_checkpointing_offload(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA with every block checkpointed, its input on the host."""
    return _checkpointed(lora, model, cell, offload=True)


def lora_all_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply LoRA on every linear layer with every block checkpointed."""
    return _checkpointed(lora_all, model, cell)


def dora_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply DoRA with every block checkpointed."""
    return _checkpointed(dora, model, cell)


def bitfit_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply BitFit with every block checkpointed."""
    return _checkpointed(bitfit, model, cell)


def houlsby_checkpointing(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Apply Houlsby's adapters with every block checkpointed."""
    return _checkpointed(houlsby, model, cell)


def _checkpointed(
    method: Method, model: PreTrainedModel, cell: Cell, *, offload: bool = False
) -> PreTrainedModel:
    # Found first, because the method may replace the blocks in these lists.
    lists = find_blocks(model)
    model = method(model, cell)
    for found in lists:
        blocks = nn.ModuleList()
        for index, block in enumerate(getattr(found.owner, found.attribute)):
            inside = block
            if cell.mlp_chunks > 1:
                inside = ChunkedBlock(_in_halves(block, found), cell.mlp_chunks)
            blocks.append(CheckpointedBlock(inside, f"{found.name}.{index}", offload))
        setattr(found.owner, found.attribute, blocks)
    return model


class CheckpointedBlock(nn.Module):
    """A block that saves only its input, on the device or in host memory."""

    def __init__(self, block: nn.Module, name: str = "", offload: bool = False) -> None:
        super().__init__()
        self.block = block
        self.name = name
        self.host_ledger = TransferLedger() if offload else None
        """Bytes of inputs copied to and from host memory so far; None if they stay."""
        if hasattr(block, "attention_type"):  # read by the loop of ModernBERT
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output: `batch seq hidden`, or a tuple with it."""
        place = (
            contextlib.nullcontext()
            if self.host_ledger is None
            else saved_on_host(self.host_ledger, self.name)
        )
        with place:
            return checkpoint(self.block, hidden, *args, use_reentrant=False, **kwargs)


class ChunkedBlock(nn.Module):
    """A block in halves whose MLP half runs in parts of the tokens."""

    def __init__(self, block: AdaptedBlock, num_chunks: int) -> None:
        super().__init__()
        self.block = block
        self.num_chunks = num_chunks
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output: `batch seq hidden`, or a tuple with it."""
        layout = self.block.family.layout(self.block.block)
        with norms_in_parts(self.block, self.num_chunks):
            attended = self.block.attention(hidden, *args, **kwargs)
        # Both halves of a parallel block read its input, and their outputs are added.
        read = hidden if layout.is_parallel else attended
        parts = [
            checkpoint(self.block.mlp, part, use_reentrant=False)
            for part in read.chunk(self.num_chunks, dim=1)
        ]
        output = torch.cat(parts, dim=1)
        return layout.returned(attended + output if layout.is_parallel else output)


def _in_halves(block: nn.Module, found: BlockList) -> AdaptedBlock:
    """Return a block that runs as two halves."""
    if isinstance(block, AdaptedBlock):
        return block
    return AdaptedBlock(block, found.family)


def saved_on_host(ledger: TransferLedger, place: str) -> saved_tensors_hooks:
    """Return a context in which what autograd saves goes to host memory.

    Args:
        ledger: counts the bytes in both directions.
        place: name under which they are counted.
    """
    inner = save_on_cpu(pin_memory=True)

    def pack(tensor: Tensor) -> Any:
        ledger.d2h[TransferTag(place, "forward")] += tensor.nbytes
        return inner.pack_hook(tensor)

    def unpack(packed: Any) -> Tensor:
        tensor: Tensor = inner.unpack_hook(packed)
        ledger.h2d[TransferTag(place, "backward")] += tensor.nbytes
        return tensor

    return saved_tensors_hooks(pack, unpack)
