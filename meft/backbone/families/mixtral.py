"""Mixtral and Qwen3-MoE: LLaMA's block with a mixture of experts as feed-forward.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(RMS(x))
mlp:        out = a + sum_i r_i(z) expert_i(z) [+ adapter(z)],   z = RMS(a)

r_i(z) is 0 for all but the experts that the router chooses for a token. Some blocks of
Qwen3-MoE have LLaMA's feed-forward instead.
"""

from meft.backbone.families.llama import LAYOUT
from meft.backbone.family import Family

FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=3,
        block=block,
        layouts=(LAYOUT,),
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        # No `causal_lm`: the loss may have a term that balances the experts.
    )
    for name, model_type, block in (
        ("Mixtral", "mixtral", "MixtralDecoderLayer"),
        ("Qwen3-MoE", "qwen3_moe", "Qwen3MoeDecoderLayer"),
    )
)
