"""BART: a post-norm encoder, and a post-norm decoder that also looks at the encoder.

    attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
    cross:      c   = LN(a + W_o attend(a, encoder))   (decoder only)
    mlp:        out = LN(c + W_2 act(W_1 c) [+ adapter(c)])

Cross-attention belongs to the attention half: it mixes tokens, and what it reads of the
encoder is an input of the block beside the streams.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from meft.backbone.family import Adapter, AdapterShape, Family
from meft.shapes import Hidden

Source = Float[Tensor, "batch source hidden"]
"""What the encoder gives: another text than the decoder's, so of another length."""


def attention_half(
    block: Any,
    hidden: Hidden,
    adapter: Adapter | None = None,
    *,
    encoder_hidden_states: Source | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = None,
    **call: Any,
) -> Hidden:
    """Self-attention of one block and, in a decoder, attention to the encoder."""
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
    """Feed-forward of one block."""
    update = block.activation_fn(block.fc1(hidden))
    update = functional.dropout(update, block.activation_dropout, block.training)
    update = functional.dropout(block.fc2(update), block.dropout, block.training)
    if adapter is not None:
        update = update + adapter(hidden)
    # transformers' encoder block goes on to clamp what overflows in float16. Left out:
    # an overflow should reach the loss scaler, which skips the step.
    normed: Tensor = block.final_layer_norm(hidden + update)
    return normed


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Width, activation, dropout and initial size of an adapter in `block`."""
    return AdapterShape(
        hidden_size=config.d_model,
        activation=block.activation_fn,
        dropout=config.dropout,
        std=config.init_std,
    )


BART_ENCODER, BART_DECODER = (
    Family(
        name=name,
        block=block,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: True,
    )
    for name, block in (
        ("BART", BartEncoderLayer),
        ("BART", BartDecoderLayer),
    )
)
