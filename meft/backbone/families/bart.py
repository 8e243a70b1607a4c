"""BART: a post-norm encoder, and a post-norm decoder with attention to the encoder.

    attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
    cross:      c   = LN(a + W_o attend(a, encoder))   (decoder only)
    mlp:        out = LN(c + W_2 act(W_1 c) [+ adapter(c)])

transformers' encoder block then clamps overflows in FP16. This is omitted: an overflow
should reach the loss scaler, which skips the step.
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half(chain="self_attn ~dropout", outside="self_attn_layer_norm"),
    cross=Half(chain="encoder_attn ~dropout", outside="encoder_attn_layer_norm"),
    mlp=Half(
        chain="fc1 activation_fn ~activation_dropout fc2 ~dropout",
        outside="final_layer_norm",
    ),
)

FAMILIES = tuple(
    Family(
        name="BART",
        model_type="bart",
        order=2,
        block=block,
        layouts=(LAYOUT,),
        new_heads=("classification_head", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
    )
    for block in ("BartEncoderLayer", "BartDecoderLayer")
)
