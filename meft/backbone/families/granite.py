"""Granite: LLaMA's block with the update of each half times a number.

attention:  a   = x + r u [+ adapter(r u)],        u = W_o attend(RMS(x))
mlp:        out = a + r W_down(act(W_gate z) * W_up z) [+ adapter(z)],   z = RMS(a)
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn *residual_multiplier"),
    mlp=Half("post_attention_layernorm", "mlp *residual_multiplier"),
)

FAMILIES = (
    Family(
        name="Granite",
        model_type="granite",
        order=3,
        block="GraniteDecoderLayer",
        layouts=(LAYOUT,),
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
    ),
)
