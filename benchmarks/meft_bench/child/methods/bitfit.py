"""BitFit: the biases of the backbone (Ben Zaken et al., ACL 2022).

    W x + b    b trains, W does not

Their gradients need no activations of linear layers.
"""

from transformers import PreTrainedModel

from meft.backbone.find import find_blocks
from meft.backbone.heads import freeze_all_but_head
from meft_bench.shared.cell import Cell


def bitfit(model: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Train the biases of all blocks, those of norms included, and the new head.

    Raises:
        ValueError: the blocks have no bias, as those of LLaMA.
    """
    freeze_all_but_head(model)
    biases = [
        parameter
        for found in find_blocks(model)
        for block in found.listed
        for name, parameter in block.named_parameters()
        if name.rpartition(".")[-1] == "bias"
    ]
    if not biases:
        raise ValueError(
            f"method {cell.method!r} trains biases, and the blocks of "
            f"{type(model).__name__} have none: take 'ln-tuning', or a model with "
            "biases, such as a BERT or OPT"
        )
    for bias in biases:
        bias.requires_grad_(True)
    return model
