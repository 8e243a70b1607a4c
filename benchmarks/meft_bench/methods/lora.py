"""LoRA (Hu et al., ICLR 2022), from the `peft` library.

    W x  becomes  W x + (alpha / r) B A dropout(x),   B = 0 at the start

on the query and value projections, with r = `cell.lora_rank` and alpha = 2 r, the
factor that peft's and the paper's classification runs commonly use. Dropout is the
backbone's own, so that every method here regularises its additions alike.
"""

from peft import LoraConfig, inject_adapter_in_model
from transformers import BertForSequenceClassification

from meft_bench.cell import Cell


def lora(
    model: BertForSequenceClassification, cell: Cell
) -> BertForSequenceClassification:
    """LoRA pairs on query and value train, and the new classifier."""
    config = LoraConfig(
        r=cell.lora_rank,
        lora_alpha=2 * cell.lora_rank,
        lora_dropout=model.config.hidden_dropout_prob,
        target_modules=["query", "value"],
    )
    # Injected in place: `get_peft_model` would keep a frozen copy of the classifier.
    inject_adapter_in_model(config, model)
    model.classifier.requires_grad_(True)
    return model
