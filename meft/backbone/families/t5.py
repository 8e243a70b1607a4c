"""T5 and Flan-T5: pre-norm encoders and decoders with a bias by relative position.

    attention:  a   = x + u [+ adapter(u)],     u = dropout(W_o attend(RMS(x), bias))
    cross:      c   = a + dropout(W_o attend(RMS(a), encoder))   (decoder only)
    mlp:        out = c + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = RMS(c)

The first block computes the bias, and its loop passes it on to the others. As in BART,
clamping of overflows in FP16 is omitted.
"""

from typing import Any

from torch import Tensor

from meft.backbone.caches import cache_of
from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout
from meft.shapes import Hidden

_ATTENTION = Half("layer.0.layer_norm", "layer.0.SelfAttention layer.0.dropout")
ENCODER = Layout(
    attention=_ATTENTION,
    mlp=Half("layer.1.layer_norm", "layer.1.DenseReluDense layer.1.dropout"),
    renamed=(("attention_mask", "mask"),),
    returns=3,
)
DECODER = Layout(
    attention=_ATTENTION,
    cross=Half("layer.1.layer_norm", "layer.1.EncDecAttention layer.1.dropout"),
    mlp=Half("layer.2.layer_norm", "layer.2.DenseReluDense layer.2.dropout"),
    renamed=(("attention_mask", "mask"),),
    returns=3,
)


def _extra_outputs(
    block: Any, hidden: Hidden, call: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Compute the bias of self-attention; that of cross-attention is 0 in every block.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        call: its other arguments, by name.
    """
    attention, bias = block.layer[0].SelfAttention, call.get("position_bias")
    if bias is None and attention.has_relative_attention_bias:
        cache, mask, length = (
            cache_of(call),
            call.get("attention_mask"),
            hidden.shape[1],
        )
        seen = cache.get_seq_length(attention.layer_idx) if cache is not None else 0
        # A cache of fixed size has more keys than it has seen tokens.
        keys = mask.shape[-1] if isinstance(mask, Tensor) else length + seen
        bias = attention.compute_bias(
            length, keys, device=hidden.device, past_seen_tokens=seen
        )
    return call | {"position_bias": bias}, (bias, None)


FAMILIES = (
    Family(
        name="T5",
        model_type="t5",
        order=2,
        block="T5Block",
        layouts=(ENCODER, DECODER),
        choose=lambda block: 1 if block.is_decoder else 0,
        new_heads=("classification_head", "classifier", "qa_outputs"),
        query_and_value=("q", "v"),
        extra_outputs=_extra_outputs,
    ),
)
