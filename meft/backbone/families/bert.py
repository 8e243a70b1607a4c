"""BERT and RoBERTa: post-norm encoders with the same block.

attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
mlp:        out = LN(a + W_2 act(W_1 a) [+ adapter(a)])
"""

from typing import Any

from torch import Tensor
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from meft.backbone.family import Adapter, AdapterShape, Family
from meft.shapes import Hidden


def attention_half(
    block: Any,
    hidden: Hidden,
    adapter: Adapter | None = None,
    *,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    past_key_values: None = None,
    cache: None = None,
    **call: Any,
) -> Hidden:
    """Run self-attention of one block; the arguments of decoders are None.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs after attention, if given.
        attention_mask: the mask of the tokens.
        encoder_hidden_states: None.
        encoder_attention_mask: None.
        past_key_values: None.
        cache: None.
        **call: other arguments of self-attention.

    Returns:
        The result, of the shape of `hidden`.
    """
    attended, _ = block.attention.self(hidden, attention_mask=attention_mask, **call)
    output = block.attention.output
    update = output.dropout(output.dense(attended))
    if adapter is not None:
        update = update + adapter(update)
    normed: Tensor = output.LayerNorm(update + hidden)
    return normed


def mlp_half(block: Any, hidden: Hidden, adapter: Adapter | None = None) -> Hidden:
    """Run the feed-forward of one block, and an adapter in parallel with it.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs on the input of the feed-forward, if given.

    Returns:
        The result, of the shape of `hidden`.
    """
    update = block.output.dropout(block.output.dense(block.intermediate(hidden)))
    if adapter is not None:
        update = update + adapter(hidden)
    normed: Tensor = block.output.LayerNorm(update + hidden)
    return normed


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Return width, activation, dropout and initial size of an adapter in `block`."""
    return AdapterShape(
        hidden_size=config.hidden_size,
        activation=block.intermediate.intermediate_act_fn,
        dropout=config.hidden_dropout_prob,
        std=config.initializer_range,
    )


def _refuse(block: Any) -> str | None:
    if not block.is_decoder:
        return None
    return "it has `config.is_decoder=True`: load it with `is_decoder=False`"


FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=0,
        block=block,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: True,
        in_parts=("attention", "attention.output", "output"),
        refuse=_refuse,
        new_heads=("classifier", "qa_outputs"),
        query_and_value=("query", "value"),
        takes_parallel_adapter=True,
    )
    for name, model_type, block in (
        ("BERT", "bert", BertLayer),
        ("RoBERTa", "roberta", RobertaLayer),
    )
)
