"""GPT-NeoX and Pythia: parallel decoders; `use_parallel_residual=False` is pre-norm.

parallel:   out = x + u [+ adapter(u)] + dropout(W_2 act(W_1 z)) [+ adapter(z)],
            u = dropout(W_o attend(LN_1(x))),   z = LN_2(x)
pre-norm:   a   = x + u [+ adapter(u)]
            out = a + dropout(W_2 act(W_1 z)) [+ adapter(z)],   z = LN_2(a)
"""

from dataclasses import replace

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

PRE_NORM = Layout(
    attention=Half("input_layernorm", "attention post_attention_dropout"),
    mlp=Half("post_attention_layernorm", "mlp post_mlp_dropout"),
)
PARALLEL = replace(PRE_NORM, is_parallel=True, adds_input_last=True)

FAMILIES = (
    Family(
        name="GPT-NeoX",
        model_type="gpt_neox",
        order=3,
        block="GPTNeoXLayer",
        layouts=(PARALLEL, PRE_NORM),
        choose=lambda block: 0 if block.use_parallel_residual else 1,
        new_heads=("score", "classifier", "qa_outputs"),
        query_and_value=("query_key_value",),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="GPTNeoXForCausalLM", body="gpt_neox"),
    ),
)
