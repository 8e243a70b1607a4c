"""What a method needs of a transformers model: its blocks, their attention and MLP
halves, what to freeze, and where the encoder loop sits.

One family so far, BERT. A block's two halves are, with dropout left out,

    attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
    mlp:        out = LN(a + W_2 act(W_1 a) [+ adapter(a)])

so the attention adapter is sequential with its own skip and the feed-forward adapter is
parallel (Liao et al., NeurIPS 2023; placement as in the authors' BERT code).
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer

from meft.errors import UnsupportedModelError
from meft.shapes import Hidden

NEW_HEADS = ("classifier", "qa_outputs")
"""Attributes that hold a task head without pre-trained weights, which must train.
Poolers and language-model heads are pre-trained and stay frozen."""


def find_bert(model: nn.Module) -> BertModel:
    """The `BertModel` inside `model`, which may be one itself.

    Raises:
        UnsupportedModelError: `model` has none, or it is a decoder.
    """
    bert = model if isinstance(model, BertModel) else getattr(model, "bert", None)
    if not isinstance(bert, BertModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: expected one of transformers' "
            "Bert* classes (BertModel, BertForSequenceClassification, "
            "BertForQuestionAnswering, BertForMaskedLM, ...)"
        )
    if bert.config.is_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} has `config.is_decoder=True`: BERT is supported "
            "as an encoder only; load it with `is_decoder=False`"
        )
    return bert


def blocks_of(bert: BertModel) -> list[BertLayer]:
    """The blocks of `bert`, lowest first."""
    return [cast(BertLayer, block) for block in bert.encoder.layer]


def freeze_all_but_head(model: PreTrainedModel) -> None:
    """Freeze every parameter except those of a task head without trained weights."""
    model.requires_grad_(False)
    for name in NEW_HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            head.requires_grad_(True)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any block of `model` has gradient checkpointing switched on."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def attention_half(
    block: BertLayer,
    hidden: Hidden,
    mask: Tensor | None,
    adapter: nn.Module | None = None,
    **kwargs: Any,
) -> Hidden:
    """Self-attention of one block, with its dropout, residual and norm."""
    attended, _ = block.attention.self(hidden, attention_mask=mask, **kwargs)
    output = block.attention.output
    update = output.dropout(output.dense(attended))
    if adapter is not None:
        update = update + adapter(update)
    return cast(Tensor, output.LayerNorm(update + hidden))


def mlp_half(
    block: BertLayer, hidden: Hidden, adapter: nn.Module | None = None
) -> Hidden:
    """Feed-forward of one block, with its dropout, residual and norm."""
    update = block.output.dropout(block.output.dense(block.intermediate(hidden)))
    if adapter is not None:
        update = update + adapter(hidden)
    return cast(Tensor, block.output.LayerNorm(update + hidden))
