"""Gemma 2 and Gemma 3: decoders with a norm before and after each half, inside the sum.

attention:  a   = x + u [+ adapter(u)],            u = RMS(W_o attend(RMS(x)))
mlp:        out = a + RMS(W_down(act(W_gate z) * W_up z)) [+ adapter(z)],   z = RMS(a)

Blocks attend to a window and to all tokens in turn.
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn post_attention_layernorm"),
    mlp=Half("pre_feedforward_layernorm", "mlp post_feedforward_layernorm"),
)

FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=3,
        block=block,
        defined_in=f"transformers.models.{module}.modeling_{module}",
        layouts=(LAYOUT,),
        new_heads=("score",),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=causal_lm,
    )
    for name, model_type, module, block, causal_lm in (
        # Gemma 2 caps its logits.
        ("Gemma 2", "gemma2", "gemma2", "Gemma2DecoderLayer", None),
        (
            "Gemma 3",
            "gemma3_text",
            "gemma3",
            "Gemma3DecoderLayer",
            CausalLM(model_class="Gemma3ForCausalLM"),
        ),
    )
)
