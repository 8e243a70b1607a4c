"""BLOOM: a pre-norm decoder whose attention and feed-forward add the residual.

attention:  a   = x + u [+ adapter(u)],            u = dropout(W_o attend(LN(x)))
mlp:        out = a + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = LN(a)
"""

from typing import Any

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half("input_layernorm", "+self_attention"),
    mlp=Half("post_attention_layernorm", "+mlp"),
    returns=2,
)


def _refuse(block: Any) -> str | None:
    if not getattr(block, "apply_residual_connection_post_layernorm", False):
        return None
    return (
        "its residuals are the outputs of norms "
        "(`config.apply_residual_connection_post_layernorm=True`), which none of the "
        "released models has: set it to False"
    )


FAMILIES = (
    Family(
        name="BLOOM",
        model_type="bloom",
        order=3,
        block="BloomBlock",
        layouts=(LAYOUT,),
        refuse=_refuse,
        new_heads=("score", "classifier", "qa_outputs"),
        query_and_value=("query_key_value",),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="BloomForCausalLM", body="transformer"),
    ),
)
