"""ViT and DeiT: pre-norm encoders of image patches with the same block.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
mlp:        out = a + W_2 act(W_1 z) [+ adapter(z)],   z = LN(a)
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("layernorm_before", "attention dropout"),
    mlp=Half("layernorm_after", "mlp dropout"),
)

FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=4,
        block=f"{name}Layer",
        layouts=(LAYOUT,),
        new_heads=new_heads,
        query_and_value=("q_proj", "v_proj"),
    )
    for name, model_type, new_heads in (
        ("ViT", "vit", ("classifier",)),
        ("DeiT", "deit", ("classifier", "cls_classifier", "distillation_classifier")),
    )
)
