"""GPT-2: a pre-norm decoder whose dropouts are inside attention and feed-forward.

attention:  a   = x + u [+ adapter(u)],            u = dropout(W_o attend(LN(x)))
mlp:        out = a + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = LN(a)
"""

from typing import Any

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(attention=Half("ln_1", "attn"), mlp=Half("ln_2", "mlp"))


def _refuse(block: Any) -> str | None:
    if not hasattr(block, "crossattention"):
        return None
    return (
        "it has attention to an encoder (`config.add_cross_attention=True`): load it "
        "with `add_cross_attention=False`"
    )


FAMILIES = (
    Family(
        name="GPT-2",
        model_type="gpt2",
        order=3,
        block="GPT2Block",
        layouts=(LAYOUT,),
        refuse=_refuse,
        new_heads=("score", "classifier", "qa_outputs", "multiple_choice_head"),
        query_and_value=("c_attn",),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="GPT2LMHeadModel", body="transformer"),
    ),
)
