"""Cohere's Command R: a parallel decoder with one norm for both halves.

out = x + u [+ adapter(u)] + W_down(act(W_gate z) * W_up z) [+ adapter(z)],
u = W_o attend(z),   z = LN(x)
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn"),
    mlp=Half("input_layernorm", "mlp"),
    is_parallel=True,
)

FAMILIES = (
    Family(
        name="Cohere",
        model_type="cohere",
        order=3,
        block="CohereDecoderLayer",
        layouts=(LAYOUT,),
        new_heads=(),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        # No `causal_lm`: it scales its logits.
    ),
)
