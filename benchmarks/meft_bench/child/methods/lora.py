"""LoRA (Hu et al., ICLR 2022) and its variants, from the `peft` library.

    W x  becomes  W x + s B A dropout(x),   B = 0 at the start,   s = alpha / r

on the query and value projections of every attention, with r = `cell.lora_rank` and
alpha = 2 r (`protocol.LORA_ALPHA_PER_RANK`), the factor that classification runs of
peft and of the paper commonly use. Dropout is that of the backbone, so that every
method regularises its additional modules equally.

lora_all  on every linear layer of every block (QLoRA, Dettmers et al., NeurIPS 2023)
rslora    s = alpha / sqrt(r) (Kalajdzievski, 2023)
dora      magnitude and direction of W train apart (Liu et al., ICML 2024); the norm of
          W counts as a constant in the gradient
lora_fa   A keeps its random values, so that x is not saved for its gradient
          (Zhang et al., 2023); the gradient of B is multiplied by (A A^T)^-1 / s^2,
          by the optimizer of peft
"""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meft.backbone.find import find_blocks
from meft.bottleneck import wide_dtype
from meft_bench.child.backbones import heads_of
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell


def lora(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train LoRA matrices on query and value, and the new head."""
    return _lora(model, cell, query_and_value(model))


def lora_all(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train LoRA matrices on every linear layer of the blocks, and the new head."""
    return _lora(model, cell, linear_layers(model))


def _variant(model: PreTrainedModel, cell: Cell, **fields: Any) -> PreTrainedModel:
    return _lora(model, cell, query_and_value(model), **fields)


rslora = partial(_variant, use_rslora=True)
dora = partial(_variant, use_dora=True)


def lora_fa(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train the matrices B of LoRA on query and value, and the new head."""
    model = lora(model, cell)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model


def lora_fa_optimizer(
    model: PreTrainedModel, groups: list[dict[str, Any]], cell: Cell
) -> torch.optim.Optimizer:
    """Return the optimizer of peft, which corrects the gradients of B.

    Args:
        model: the model.
        groups: trained parameters with their decay; matrices A are added.
        cell: the cell to run.
    """
    named = dict(model.named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    found: Any = []
    for group in groups:
        chosen = []
        for parameter in group["params"]:
            # It knows a pair by the order, A before B.
            first = named[names[parameter].replace(".lora_B.", ".lora_A.")]
            chosen += [parameter] if first is parameter else [first, parameter]
        of_pairs = [names[parameter] for parameter in chosen]
        scale = float(protocol.LORA_ALPHA_PER_RANK)
        scales = {
            "scaling_factors": [scale if ".lora_" in n else None for n in of_pairs],
            "scaling_factor": scale,  # as peft before 0.21 calls it
        }
        found.append({**group, **scales, "params": chosen, "names": of_pairs})
    return LoraFAOptimizer(found, betas=protocol.ADAM_BETAS, eps=protocol.ADAM_EPSILON)


def _lora(
    model: PreTrainedModel, cell: Cell, targets: list[str], **fields: Any
) -> PreTrainedModel:
    found, *_ = find_blocks(model)
    config = LoraConfig(
        r=cell.lora_rank,
        lora_alpha=protocol.LORA_ALPHA_PER_RANK * cell.lora_rank,
        lora_dropout=found.family.adapter_shape(found.blocks[0], found.config).dropout,
        target_modules=targets,
        fan_in_fan_out=has_transposed(model),
        **fields,
    )
    # Injected in place: `get_peft_model` would keep a frozen copy of the head.
    inject_adapter_in_model(config, model)
    return with_head(model)


def query_and_value(model: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of the query and value projections."""
    found, *_ = find_blocks(model)
    return list(found.family.query_and_value)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers of the blocks, of every list of blocks."""
    # peft's own "all-linear" takes the new head and the pooler as well.
    return [
        f"{found.name}.{index}.{name}"
        for found in find_blocks(model)
        for index, block in enumerate(found.listed)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def has_transposed(model: PreTrainedModel) -> bool:
    """Return whether linear layers hold their weights transposed, as GPT-2's do."""
    found, *_ = find_blocks(model)
    return any(isinstance(module, Conv1D) for module in found.blocks[0].modules())


def with_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make what peft has added wide, and the new head trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft made it in the dtype of the backbone
            parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
    for part in heads_of(model):
        part.requires_grad_(True)
    return model
