"""Phi-1, Phi-1.5 and Phi-2: parallel decoders with one norm for both halves.

out = x + u [+ adapter(u)] + dropout(W_2 act(W_1 z)) [+ adapter(z)],
u = dropout(W_o attend(z)),   z = LN(x)
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn resid_dropout"),
    mlp=Half("input_layernorm", "mlp resid_dropout"),
    is_parallel=True,
    adds_input_last=True,
)

FAMILIES = (
    Family(
        name="Phi",
        model_type="phi",
        order=3,
        block="PhiDecoderLayer",
        layouts=(LAYOUT,),
        new_heads=("score",),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="PhiForCausalLM"),
    ),
)
