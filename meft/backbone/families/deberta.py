"""DeBERTa, DeBERTa-v2 and v3: BERT's post-norm block with disentangled attention.

attention:  a   = LN(x + u [+ adapter(u)]),        u = dropout(W_o attend(x, positions))
mlp:        out = LN(a + dropout(W_2 act(W_1 a)) [+ adapter(a)])

All blocks are given the same embeddings of relative positions, which the model trains.
The large models of v2 add a convolution to the output of the first block, which
therefore stays as it is.
"""

from dataclasses import replace
from typing import Any

from meft.backbone.families.bert import LAYOUT as BERT
from meft.backbone.family import Family

LAYOUT = replace(BERT, returns=2)


def _prefix(config: Any) -> int:
    return 1 if getattr(config, "conv_kernel_size", 0) > 0 else 0


FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=0,
        block=block,
        layouts=(LAYOUT,),
        new_heads=("classifier", "qa_outputs"),
        query_and_value=query_and_value,
        prefix=_prefix,
        takes_parallel_adapter=True,
    )
    for name, model_type, block, query_and_value in (
        ("DeBERTa", "deberta", "DebertaLayer", ("in_proj",)),
        ("DeBERTa-v2", "deberta-v2", "DebertaV2Layer", ("query_proj", "value_proj")),
    )
)
