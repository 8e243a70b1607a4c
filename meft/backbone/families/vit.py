"""ViT and DeiT: pre-norm encoders of image patches with the same block.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
mlp:        out = a + W_2 act(W_1 z) [+ adapter(z)],   z = LN(a)
"""

from typing import Any

from torch import Tensor
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from meft.backbone.family import Adapter, AdapterShape, Family
from meft.shapes import Hidden


def attention_half(
    block: Any,
    hidden: Hidden,
    adapter: Adapter | None = None,
    *,
    attention_mask: Tensor | None = None,
    **call: Any,
) -> Hidden:
    """Run self-attention of one block.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs after attention, if given.
        attention_mask: the mask of the tokens.
        **call: other arguments of self-attention.

    Returns:
        The result, of the shape of `hidden`.
    """
    update, *_ = block.attention(block.layernorm_before(hidden), attention_mask, **call)
    update = block.dropout(update)
    if adapter is not None:
        update = update + adapter(update)
    summed: Tensor = update + hidden
    return summed


def mlp_half(block: Any, hidden: Hidden, adapter: Adapter | None = None) -> Hidden:
    """Run the feed-forward of one block, and an adapter in parallel with it.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs on the input of the feed-forward, if given.

    Returns:
        The result, of the shape of `hidden`.
    """
    inner = block.layernorm_after(hidden)
    update = block.dropout(block.mlp(inner))
    if adapter is not None:
        update = update + adapter(inner)
    summed: Tensor = update + hidden
    return summed


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Return width, activation, dropout and initial size of an adapter in `block`."""
    return AdapterShape(
        hidden_size=config.hidden_size,
        activation=block.mlp.activation_fn,
        dropout=config.hidden_dropout_prob,
        std=config.initializer_range,
    )


FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=4,
        block=block,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: False,
        new_heads=new_heads,
        query_and_value=("q_proj", "v_proj"),
    )
    for name, model_type, block, new_heads in (
        ("ViT", "vit", ViTLayer, ("classifier",)),
        (
            "DeiT",
            "deit",
            DeiTLayer,
            ("classifier", "cls_classifier", "distillation_classifier"),
        ),
    )
)
