"""ModernBERT: a pre-norm encoder, without a norm before the first block's attention.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
mlp:        out = a + W_o(act(h) * g) [+ adapter(z)],   h, g = W_i z,   z = LN(a)

Blocks attend to a window and to all tokens in turn.
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(attention=Half("attn_norm", "attn"), mlp=Half("mlp_norm", "mlp"))

FAMILIES = (
    Family(
        name="ModernBERT",
        model_type="modernbert",
        order=0,
        block="ModernBertEncoderLayer",
        layouts=(LAYOUT,),
        new_heads=("classifier",),
        query_and_value=("Wqkv",),
        takes_parallel_adapter=True,
    ),
)
