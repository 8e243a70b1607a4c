"""StableLM: pre-norm decoders; those with `use_parallel_residual=True` are parallel.

pre-norm:   a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
            out = a + dropout(W_down(act(W_gate z) * W_up z)) [+ adapter(z)],
            z = LN(a)
parallel:   out = x + u [+ adapter(u)] + dropout(W_down(...)) [+ adapter(z)],
            with one norm for both, z = LN(x)
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

PRE_NORM = Layout(
    attention=Half("input_layernorm", "self_attn"),
    mlp=Half("post_attention_layernorm", "mlp dropout"),
)
PARALLEL = Layout(
    attention=Half("input_layernorm", "self_attn"),
    mlp=Half("input_layernorm", "mlp dropout"),
    is_parallel=True,
)

FAMILIES = (
    Family(
        name="StableLM",
        model_type="stablelm",
        order=3,
        block="StableLmDecoderLayer",
        layouts=(PRE_NORM, PARALLEL),
        choose=lambda block: 1 if block.use_parallel_residual else 0,
        new_heads=("score",),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="StableLmForCausalLM"),
    ),
)
