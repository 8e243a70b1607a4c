"""DistilBERT: a post-norm encoder whose attention has no dropout at its end.

attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
mlp:        out = LN(a + dropout(W_2 act(W_1 a)) [+ adapter(a)])
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half(chain="attention", outside="sa_layer_norm"),
    mlp=Half(chain="ffn", outside="output_layer_norm"),
)

FAMILIES = (
    Family(
        name="DistilBERT",
        model_type="distilbert",
        order=0,
        block="TransformerBlock",
        layouts=(LAYOUT,),
        new_heads=("pre_classifier", "classifier", "qa_outputs"),
        query_and_value=("q_lin", "v_lin"),
        takes_parallel_adapter=True,
    ),
)
