"""Run the MLP of every block in parts of the tokens, for methods that leave blocks be.

Reversible methods and those with checkpointing split the MLP themselves
(`Cell.mlp_chunks`). A method that changes parameters, or modules inside of blocks, has
it from here: its blocks run in halves, of which the second is checkpointed in parts.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from meft.backbone.find import BlockList, find_blocks
from meft_bench.child.backbones import any_family
from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.child.methods.adapters import AdaptedBlock
from meft_bench.child.methods.checkpointing import ChunkedBlock
from meft_bench.shared.cell import Cell


def blocks_before(model: PreTrainedModel, cell: Cell) -> Sequence[BlockList]:
    """Return the blocks of a model before its method is applied.

    Raises:
        ValueError: the family of the model is not known.
    """
    if not any_family.is_known(model.config):
        raise ValueError(
            f"`mlp_chunks` = {cell.mlp_chunks} needs a family that sweeps know, and "
            f"{cell.backbone} is of model_type {model.config.model_type!r}: leave it "
            "out"
        )
    return find_blocks(model)


def split(model: Any, lists: Sequence[BlockList], cell: Cell) -> None:
    """Run the MLPs of a model in parts, in place.

    Args:
        model: the model, with its method.
        lists: its blocks before the method was applied.
        cell: the cell.

    Raises:
        ValueError: the method has replaced or checkpointed the blocks.
    """
    begin = f"`mlp_chunks` = {cell.mlp_chunks} with method {cell.method!r}, which "
    if getattr(base_of(model), "is_gradient_checkpointing", False):
        raise ValueError(
            f"{begin}has transformers checkpoint its blocks: leave it out, or take a "
            "method without checkpointing"
        )
    for found in lists:
        now = getattr(found.owner, found.attribute)
        if [*map(id, now)] != [*map(id, found.listed)]:
            raise ValueError(f"{begin}replaces the blocks of the model: leave it out")
    for found in lists:
        blocks = [
            ChunkedBlock(AdaptedBlock(block, found.family, None, None), cell.mlp_chunks)
            for block in found.listed
        ]
        setattr(found.owner, found.attribute, nn.ModuleList(blocks))
