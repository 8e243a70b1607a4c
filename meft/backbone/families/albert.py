"""ALBERT: BERT's post-norm block, which the model calls in every layer.

attention:  a   = LN(x + u [+ adapter(u)]),        u = dropout(W_o attend(x))
mlp:        out = LN(a + W_2 act(W_1 a) [+ adapter(a)])

A model has few blocks, usually one, and calls each several times. Their weights are
shared; each call has adapters of its own.
"""

from typing import Any

from meft.backbone.family import Family
from meft.backbone.layout import Half, Layout

_LAYER = "albert_layers.0"
LAYOUT = Layout(
    attention=Half(
        chain=f"{_LAYER}.attention", inside=f"{_LAYER}.attention.output_dropout"
    ),
    mlp=Half(
        chain=f"{_LAYER}.ffn {_LAYER}.activation {_LAYER}.ffn_output",
        outside=f"{_LAYER}.full_layer_layer_norm",
    ),
)


def _calls(config: Any, number: int) -> tuple[int, ...]:
    """Return the group of layers that the model calls in each layer."""
    layers = config.num_hidden_layers
    return tuple(int(i / (layers / config.num_hidden_groups)) for i in range(layers))


def _refuse(block: Any) -> str | None:
    if len(block.albert_layers) == 1:
        return None
    return "its groups have several layers (`inner_group_num` above 1)"


FAMILIES = (
    Family(
        name="ALBERT",
        model_type="albert",
        order=0,
        block="AlbertLayerGroup",
        layouts=(LAYOUT,),
        calls=_calls,
        refuse=_refuse,
        new_heads=("classifier", "qa_outputs"),
        query_and_value=("query", "value"),
    ),
)
