"""BERT and the encoders with the same post-norm block.

attention:  a   = LN(x + u [+ adapter(u)]),        u = W_o attend(x)
mlp:        out = LN(a + W_2 act(W_1 a) [+ adapter(a)])
"""

from typing import Any

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

LAYOUT = Layout(
    attention=Half(
        chain="attention.self attention.output.dense attention.output.dropout",
        outside="attention.output.LayerNorm",
    ),
    mlp=Half(
        chain="intermediate output.dense output.dropout", outside="output.LayerNorm"
    ),
)


def _refuse(block: Any) -> str | None:
    if not getattr(block, "is_decoder", False):
        return None
    return "it has `config.is_decoder=True`: load it with `is_decoder=False`"


FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=0,
        block=block,
        layouts=(LAYOUT,),
        refuse=_refuse,
        new_heads=("classifier", "qa_outputs"),
        query_and_value=("query", "value"),
        takes_parallel_adapter=True,
    )
    for name, model_type, block in (
        ("BERT", "bert", "BertLayer"),
        ("RoBERTa", "roberta", "RobertaLayer"),
        ("XLM-RoBERTa", "xlm-roberta", "XLMRobertaLayer"),
        ("CamemBERT", "camembert", "CamembertLayer"),
        ("ELECTRA", "electra", "ElectraLayer"),
    )
)
