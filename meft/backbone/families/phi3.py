"""Phi-3 and Phi-4: LLaMA's block with dropout at the end of both halves.

attention:  a   = x + u [+ adapter(u)],            u = dropout(W_o attend(RMS(x)))
mlp:        out = a + dropout(W_down(act(g) * h)) [+ adapter(z)],
            g, h = W_gate_up z,   z = RMS(a)
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn resid_attn_dropout"),
    mlp=Half("post_attention_layernorm", "mlp resid_mlp_dropout"),
)

FAMILIES = (
    Family(
        name="Phi-3",
        model_type="phi3",
        order=3,
        block="Phi3DecoderLayer",
        layouts=(LAYOUT,),
        new_heads=("score", "qa_outputs"),
        query_and_value=("qkv_proj",),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="Phi3ForCausalLM"),
    ),
)
