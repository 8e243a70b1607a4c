"""A small BERT classifier with weights of its own in every block."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from meft_bench.cell import Cell
from meft_bench.tasks.batches import Batch

HIDDEN, BLOCKS, LABELS, VOCABULARY = 32, 3, 2, 50


def classifier(**changes: object) -> BertForSequenceClassification:
    fields: dict[str, object] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "num_labels": LABELS,
    }
    torch.manual_seed(0)
    config = BertConfig(**(fields | changes))  # type: ignore[arg-type]
    return BertForSequenceClassification(config)


def cell(**changes: object) -> Cell:
    fields: dict[str, object] = {"method": "full", "batch_size": 4, "seq_len": 8}
    return Cell(**(fields | changes))  # type: ignore[arg-type]


def batch(batch_size: int = 4, seq_len: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, seq_len)
    return {
        "input_ids": torch.randint(VOCABULARY, shape, generator=generator),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.arange(batch_size) % LABELS,
    }
