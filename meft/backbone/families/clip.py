"""CLIP and SigLIP: pre-norm towers for texts and for images with the same block.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
mlp:        out = a + W_2 act(W_1 z) [+ adapter(z)],   z = LN(a)
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("layer_norm1", "self_attn"), mlp=Half("layer_norm2", "mlp")
)

FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=4,
        block=block,
        layouts=(LAYOUT,),
        new_heads=("classifier",),
        query_and_value=("q_proj", "v_proj"),
    )
    for name, model_type, block in (
        ("CLIP", "clip", "CLIPEncoderLayer"),
        ("SigLIP", "siglip", "SiglipEncoderLayer"),
    )
)
