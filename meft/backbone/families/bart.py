"""BART: a post-norm encoder, and a post-norm decoder with attention to the encoder.

    attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
    cross:      c   = LN(a + W_o attend(a, encoder))   (decoder only)
    mlp:        out = LN(c + W_2 act(W_1 c) [+ adapter(c)])

Cross-attention belongs to the attention half: it mixes tokens, and the encoder's output
that it reads is an input of the block in addition to the streams.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from meft.backbone.family import Adapter, AdapterShape, Family
from meft.shapes import Hidden

EncoderHidden = Float[Tensor, "batch source hidden"]
"""The encoder's output, whose text, and so length, differs from the decoder's."""


def attention_half(
    block: Any,
    hidden: Hidden,
    adapter: Adapter | None = None,
    *,
    encoder_hidden_states: EncoderHidden | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = None,
    **call: Any,
) -> Hidden:
    """Run self-attention of one block and, in a decoder, attention to the encoder.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs after self-attention, if given.
        encoder_hidden_states: the encoder's output, `batch source hidden`.
        encoder_attention_mask: the mask of the encoder's tokens.
        use_cache: ignored.
        **call: arguments of self-attention.

    Returns:
        The result, of the shape of `hidden`.
    """
    update, *_ = block.self_attn(hidden, **call)
    update = functional.dropout(update, block.dropout, block.training)
    if adapter is not None:
        update = update + adapter(update)
    attended: Tensor = block.self_attn_layer_norm(hidden + update)
    if encoder_hidden_states is None:
        return attended
    call["attention_mask"] = encoder_attention_mask
    update, *_ = block.encoder_attn(
        attended, key_value_states=encoder_hidden_states, **call
    )
    update = functional.dropout(update, block.dropout, block.training)
    crossed: Tensor = block.encoder_attn_layer_norm(attended + update)
    return crossed


def mlp_half(block: Any, hidden: Hidden, adapter: Adapter | None = None) -> Hidden:
    """Run the feed-forward of one block, and an adapter in parallel with it.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs on the input of the feed-forward, if given.

    Returns:
        The result, of the shape of `hidden`.
    """
    update = block.activation_fn(block.fc1(hidden))
    update = functional.dropout(update, block.activation_dropout, block.training)
    update = functional.dropout(block.fc2(update), block.dropout, block.training)
    if adapter is not None:
        update = update + adapter(hidden)
    # transformers' encoder block then clamps float16 overflows. This is omitted: an
    # overflow should reach the loss scaler, which skips the step.
    normed: Tensor = block.final_layer_norm(hidden + update)
    return normed


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Return width, activation, dropout and initial size of an adapter in `block`."""
    return AdapterShape(
        hidden_size=config.d_model,
        activation=block.activation_fn,
        dropout=config.dropout,
        std=config.init_std,
    )


FAMILIES = tuple(
    Family(
        name="BART",
        model_type="bart",
        order=2,
        block=block,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: True,
        new_heads=("classification_head", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
    )
    for block in (BartEncoderLayer, BartDecoderLayer)
)
