"""DINOv2: a pre-norm encoder of image patches with a scale for each channel.

attention:  a   = x + u [+ adapter(u)],            u = drop(s_1 * W_o attend(LN(x)))
mlp:        out = a + drop(s_2 * W_2 act(W_1 z)) [+ adapter(z)],   z = LN(a)

`drop` leaves out the half for some images (`drop_path_rate`).
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("norm1", "attention layer_scale1 drop_path"),
    mlp=Half("norm2", "mlp layer_scale2 drop_path"),
)

FAMILIES = (
    Family(
        name="DINOv2",
        model_type="dinov2",
        order=4,
        block="Dinov2Layer",
        layouts=(LAYOUT,),
        new_heads=("classifier",),
        query_and_value=("q_proj", "v_proj"),
    ),
)
