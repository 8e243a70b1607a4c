"""OLMo 2: a decoder whose norms are at the end of each half, inside the sum.

attention:  a   = x + u [+ adapter(u)],            u = RMS(W_o attend(x))
mlp:        out = a + RMS(W_down(act(W_gate a) * W_up a)) [+ adapter(a)]
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half(chain="self_attn post_attention_layernorm"),
    mlp=Half(chain="mlp post_feedforward_layernorm"),
)

FAMILIES = (
    Family(
        name="OLMo 2",
        model_type="olmo2",
        order=3,
        block="Olmo2DecoderLayer",
        layouts=(LAYOUT,),
        new_heads=("score",),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="Olmo2ForCausalLM"),
    ),
)
