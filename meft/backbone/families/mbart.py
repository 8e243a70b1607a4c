"""MBart and Whisper: BART's encoder and decoder with the norms before each half.

    attention:  a   = x + u [+ adapter(u)],            u = dropout(W_o attend(LN(x)))
    cross:      c   = a + dropout(W_o attend(LN(a), encoder))   (decoder only)
    mlp:        out = c + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = LN(c)

As in BART, clamping of overflows in FP16 is omitted.
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("self_attn_layer_norm", "self_attn ~dropout"),
    cross=Half("encoder_attn_layer_norm", "encoder_attn ~dropout"),
    mlp=Half("final_layer_norm", "fc1 activation_fn ~activation_dropout fc2 ~dropout"),
)

FAMILIES = tuple(
    Family(
        name=name,
        model_type=name.lower(),
        order=2,
        block=f"{name}{side}Layer",
        layouts=(LAYOUT,),
        new_heads=new_heads,
        query_and_value=("q_proj", "v_proj"),
    )
    for name, new_heads in (
        ("MBart", ("classification_head", "qa_outputs")),
        ("Whisper", ("classifier",)),
    )
    for side in ("Encoder", "Decoder")
)
