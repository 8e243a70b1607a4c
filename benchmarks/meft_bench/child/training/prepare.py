"""From the names in a cell to a model that can take training steps.

load_backbone -> apply_method -> a `Stepper` on the cell's device
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import meft
from meft.sparse.row_parameter import rows_of
from meft_bench.child import backbones
from meft_bench.child.backbones import Backbone, any_family, quantised
from meft_bench.child.backbones.unwrapped import base_of
from meft_bench.child.methods import own
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.child.tasks.recall import RecallTask
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import execution, ranks
from meft_bench.child.training.steps import Stepper, seed_everything
from meft_bench.shared import methods
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import MissingError, Source

AnyTask = Task | AnswerTask | RecallTask


def load_backbone(cell: Cell, task: AnyTask, source: Source) -> Backbone:
    """Load the backbone of a cell; compile its blocks if the cell requires it.

    Args:
        cell: the cell to run.
        task: decides the head: that of a classifier, or of a language model.
        source: where weights may come from.

    Raises:
        MissingError: the weights, or the package that quantises them, are not
            available; the message states how to provide them.
        ValueError: the backbone does not exist, its family is not supported, or
            `cell.seq_len` is too long for it.
    """
    seed_everything(cell.seed)
    backbone = backbones.load(cell, num_labels_of(task), source)
    if cell.is_quantised:
        quantised.quantise(backbone.model, cell)
    if cell.blocks == "compiled":
        if not any_family.is_known(backbone.model.config):
            raise ValueError(
                f"`blocks` = 'compiled' needs a family that sweeps know, and "
                f"{cell.backbone} is of model_type "
                f"{backbone.model.config.model_type!r}: take 'eager'"
            )
        execution.compile_blocks(
            backbone.model, in_parts=methods.of(cell.method).is_reversible
        )
    return backbone


def apply_method(backbone: Backbone, cell: Cell) -> Stepper:
    """Apply the cell's method to the backbone, and move the model to its device."""
    # Seeded again, so that adapters do not depend on how the backbone was loaded.
    seed_everything(cell.seed)
    function = own.function_of(cell, backbone.model.config)
    stepper = with_method(backbone.model, cell, function)
    if stepper.ranks.rank:  # each rank draws its own dropout
        seed_everything((cell.seed + stepper.ranks.rank) % 2**32)
    return stepper


def with_method(model: Any, cell: Cell, function: own.Method) -> Stepper:
    """Apply a method to a model, and move the model to the cell's device.

    Args:
        model: the model.
        cell: the cell.
        function: the function of the method.
    """
    # For shards only: models of other families have no list of blocks.
    blocks = backbones.blocks_of(model) if cell.parallel == "fsdp2" else []
    if cell.mlp_chunks > 1 and methods.of(cell.method).leaves_blocks:
        from meft_bench.child.methods import mlp_parts  # peft takes seconds

        in_parts = mlp_parts.blocks_before(model, cell)
        model = function(model, cell)
        mlp_parts.split(model, in_parts, cell)
    else:
        model = function(model, cell)
    _chunk_loss(model, cell)
    replica = ranks.parallel(model, cell, blocks)
    return Stepper(model, cell, ranks.of(cell), replica)


def _chunk_loss(model: Any, cell: Cell) -> None:
    """Compute the loss in chunks, if the cell says so.

    Raises:
        ValueError: the model has no loss that can be.
    """
    if not cell.loss_chunk_tokens:
        return
    try:
        meft.chunk_loss(base_of(model), cell.loss_chunk_tokens)
    except meft.UnsupportedModelError as error:
        raise ValueError(
            f"leave out `loss_chunk_tokens` = {cell.loss_chunk_tokens} with method "
            f"{cell.method!r} and {cell.backbone}: {error}"
        ) from error


def num_labels_of(task: AnyTask) -> int | None:
    """Return the number of classes of the head, 1 for a number.

    None for a language-model head.
    """
    return task.num_labels if isinstance(task, Task) else None


def count(model: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of all and of trained parameters: fields of `Measurement`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "num_parameters": quantised.num_weights(model),
        "num_trainable_parameters": sum(_numel(p) for p in trained),
    }


def _numel(parameter: Tensor) -> int:
    """Return the numbers of a parameter, of all ranks if rows are divided."""
    rows = rows_of(parameter)
    if rows is None or rows.division is None:
        return parameter.numel()
    return rows.division.num_rows * rows.store.width


def require_device(cell: Cell) -> None:
    """Raise `MissingError` unless each rank has the cell's device."""
    if cell.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise MissingError("no CUDA device: torch.cuda.is_available() is false")
    if torch.cuda.device_count() < cell.ranks:
        raise MissingError(
            f"`ranks` = {cell.ranks}, each of which needs a GPU, and this process sees "
            f"{torch.cuda.device_count()}: lower it, or run the cell where there are "
            "more"
        )


def device_name(cell: Cell) -> str:
    """Return the device's name as torch reports it."""
    return torch.cuda.get_device_name() if cell.device == "cuda" else "cpu"
