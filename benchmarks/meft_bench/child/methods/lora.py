"""LoRA (Hu et al., ICLR 2022), from the `peft` library.

    W x  becomes  W x + (alpha / r) B A dropout(x),   B = 0 at the start

on the query and value projections of every attention, with r = `cell.lora_rank` and
alpha = 2 r (`protocol.LORA_ALPHA_PER_RANK`), the factor that classification runs of
peft and of the paper commonly use. Dropout is that of the backbone, so that every
method regularises its additional modules equally.
"""

from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meft.backbone.find import find_blocks
from meft.bottleneck import wide_dtype
from meft_bench.child.backbones import heads_of
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell


def lora(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train LoRA matrices on query and value, and the new head."""
    found, *_ = find_blocks(model)
    shape = found.family.adapter_shape(found.blocks[0], found.config)
    config = LoraConfig(
        r=cell.lora_rank,
        lora_alpha=protocol.LORA_ALPHA_PER_RANK * cell.lora_rank,
        lora_dropout=shape.dropout,
        target_modules=list(found.family.query_and_value),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in found.blocks[0].modules()),
    )
    # Injected in place: `get_peft_model` would keep a frozen copy of the head.
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft made it in the dtype of the backbone
            parameter.data = parameter.data.to(wide_dtype(parameter.dtype))
    for part in heads_of(model):
        part.requires_grad_(True)
    return model
