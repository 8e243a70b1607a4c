"""LLaMA and the decoders with the same pre-norm block.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(RMS(x))
mlp:        out = a + W_down(act(W_gate z) * W_up z) [+ adapter(z)],   z = RMS(a)
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "self_attn"),
    mlp=Half("post_attention_layernorm", "mlp"),
)

FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=3,
        block=f"{prefix}DecoderLayer",
        layouts=(LAYOUT,),
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class=f"{prefix}ForCausalLM"),
    )
    for name, model_type, prefix in (
        ("LLaMA", "llama", "Llama"),
        ("Mistral", "mistral", "Mistral"),
        ("Qwen2", "qwen2", "Qwen2"),
        ("Qwen3", "qwen3", "Qwen3"),
        ("Gemma", "gemma", "Gemma"),
        ("SmolLM3", "smollm3", "SmolLM3"),
    )
)
