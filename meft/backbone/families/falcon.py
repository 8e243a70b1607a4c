"""Falcon: parallel decoders with one norm or two, and the pre-norm ones of Falcon-RW.

one norm:   out = x + u [+ adapter(u)] + W_2 act(W_1 z) [+ adapter(z)],
            u = W_o attend(z),   z = LN(x)
two norms:  the same with z = LN_mlp(x) and u = W_o attend(LN_attn(x))
pre-norm:   a   = x + dropout(u) [+ adapter(...)],   u = W_o attend(LN(x))
            out = a + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = LN(a)
"""

from typing import Any

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

ONE_NORM = Layout(
    attention=Half("input_layernorm", "self_attention"),
    mlp=Half("input_layernorm", "mlp"),
    is_parallel=True,
    adds_input_last=True,
    returns=2,
)
TWO_NORMS = Layout(
    attention=Half("ln_attn", "self_attention"),
    mlp=Half("ln_mlp", "mlp"),
    is_parallel=True,
    adds_input_last=True,
    returns=2,
)
PRE_NORM = Layout(
    attention=Half("input_layernorm", "self_attention ~config.attention_dropout"),
    mlp=Half("post_attention_layernorm", "mlp ~config.hidden_dropout"),
    returns=2,
)


def _choose(block: Any) -> int:
    if hasattr(block, "post_attention_layernorm"):
        return 2
    return 1 if hasattr(block, "ln_mlp") else 0


def _refuse(block: Any) -> str | None:
    if _choose(block) == 2 or not block.config.hidden_dropout:
        return None
    return (
        "it has dropout on the sum of both halves: set `hidden_dropout=0.0` in the "
        "config, as in the released models"
    )


FAMILIES = (
    Family(
        name="Falcon",
        model_type="falcon",
        order=3,
        block="FalconDecoderLayer",
        layouts=(ONE_NORM, TWO_NORMS, PRE_NORM),
        choose=_choose,
        refuse=_refuse,
        new_heads=("score", "classifier", "qa_outputs"),
        query_and_value=("query_key_value",),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="FalconForCausalLM", body="transformer"),
    ),
)
