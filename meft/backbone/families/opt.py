"""OPT: pre-norm decoders, except for the 350M model, which is post-norm.

pre-norm:   a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
            out = a + W_2 act(W_1 z) [+ adapter(z)],   z = LN(a)
post-norm:  the same with LN outside the sums instead
"""

from meft.backbone.family import CausalLM, Family
from meft.backbone.layout import Half, Layout

MLP = "fc1 activation_fn fc2 ~dropout"
PRE_NORM = Layout(
    attention=Half("self_attn_layer_norm", "self_attn ~dropout"),
    mlp=Half("final_layer_norm", MLP),
)
POST_NORM = Layout(
    attention=Half(chain="self_attn ~dropout", outside="self_attn_layer_norm"),
    mlp=Half(chain=MLP, outside="final_layer_norm"),
)

FAMILIES = (
    Family(
        name="OPT",
        model_type="opt",
        order=1,
        block="OPTDecoderLayer",
        layouts=(PRE_NORM, POST_NORM),
        choose=lambda block: 0 if block.do_layer_norm_before else 1,
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class="OPTForCausalLM", body="model.decoder"),
    ),
)
