"""MPNet: BERT's post-norm block, whose attention adds a bias by relative position.

attention:  a   = LN(x + u [+ adapter(u)]),        u = dropout(W_o attend(x, bias))
mlp:        out = LN(a + dropout(W_2 act(W_1 a)) [+ adapter(a)])

All blocks are given the same bias, which the model computes and trains.
"""

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half(
        chain="attention.attn attention.dropout", outside="attention.LayerNorm"
    ),
    mlp=Half(
        chain="intermediate output.dense output.dropout", outside="output.LayerNorm"
    ),
    returns=1,
)

FAMILIES = (
    Family(
        name="MPNet",
        model_type="mpnet",
        order=0,
        block="MPNetLayer",
        layouts=(LAYOUT,),
        new_heads=("classifier", "qa_outputs"),
        query_and_value=("q", "v"),
        takes_parallel_adapter=True,
    ),
)
