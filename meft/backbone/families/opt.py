"""OPT: pre-norm decoders, except for the 350M model, which is post-norm.

pre-norm:   a   = x + u [+ adapter(u)],            u = W_o attend(LN(x))
            out = a + W_2 act(W_1 z) [+ adapter(z)],   z = LN(a)
post-norm:  the same with LN outside the sums instead
"""

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTForCausalLM

from meft.backbone.family import Adapter, AdapterShape, CausalLM, Family
from meft.shapes import Hidden


def attention_half(
    block: Any,
    hidden: Hidden,
    adapter: Adapter | None = None,
    *,
    use_cache: bool | None = None,
    **call: Any,
) -> Hidden:
    """Run self-attention of one block.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs after attention, if given.
        use_cache: ignored.
        **call: arguments of self-attention.

    Returns:
        The result, of the shape of `hidden`.
    """
    norm, first = block.self_attn_layer_norm, block.do_layer_norm_before
    update, *_ = block.self_attn(
        hidden_states=norm(hidden) if first else hidden, **call
    )
    update = functional.dropout(update, block.dropout, block.training)
    if adapter is not None:
        update = update + adapter(update)
    summed: Tensor = hidden + update
    return summed if first else norm(summed)


def mlp_half(block: Any, hidden: Hidden, adapter: Adapter | None = None) -> Hidden:
    """Run the feed-forward of one block, and an adapter in parallel with it.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs on the input of the feed-forward, if given.

    Returns:
        The result, of the shape of `hidden`.
    """
    norm, first = block.final_layer_norm, block.do_layer_norm_before
    inner = norm(hidden) if first else hidden
    update = block.fc2(block.activation_fn(block.fc1(inner)))
    update = functional.dropout(update, block.dropout, block.training)
    if adapter is not None:
        update = update + adapter(inner)
    summed: Tensor = hidden + update
    return summed if first else norm(summed)


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Return width, activation, dropout and initial size of an adapter in `block`."""
    return AdapterShape(
        hidden_size=config.hidden_size,
        activation=block.activation_fn,
        dropout=config.dropout,
        std=config.init_std,
    )


FAMILIES = (
    Family(
        name="OPT",
        model_type="opt",
        order=1,
        block=OPTDecoderLayer,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: not block.do_layer_norm_before,
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class=OPTForCausalLM, body="model.decoder"),
    ),
)
