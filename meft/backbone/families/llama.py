"""LLaMA and Mistral: pre-norm decoders with the same block.

attention:  a   = x + u [+ adapter(u)],            u = W_o attend(RMS(x))
mlp:        out = a + W_down(act(W_gate z) * W_up z) [+ adapter(z)],   z = RMS(a)
"""

from typing import Any

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
)

from meft.backbone.family import Adapter, AdapterShape, CausalLM, Family
from meft.shapes import Hidden


def attention_half(
    block: Any, hidden: Hidden, adapter: Adapter | None = None, **call: Any
) -> Hidden:
    """Run self-attention of one block.

    Args:
        block: the block.
        hidden: `batch seq hidden`.
        adapter: runs after attention, if given.
        **call: arguments of self-attention.

    Returns:
        The result, of the shape of `hidden`.
    """
    update, *_ = block.self_attn(hidden_states=block.input_layernorm(hidden), **call)
    if adapter is not None:
        update = update + adapter(update)
    summed: Tensor = hidden + update
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
    inner = block.post_attention_layernorm(hidden)
    update = block.mlp(inner)
    if adapter is not None:
        update = update + adapter(inner)
    summed: Tensor = hidden + update
    return summed


def adapter_shape(block: Any, config: Any) -> AdapterShape:
    """Return width, activation, dropout and initial size of an adapter in `block`.

    The family has no dropout outside attention.
    """
    return AdapterShape(
        hidden_size=config.hidden_size,
        activation=block.mlp.act_fn,
        dropout=0.0,
        std=config.initializer_range,
    )


FAMILIES = tuple(
    Family(
        name=name,
        model_type=model_type,
        order=3,
        block=block,
        attention_half=attention_half,
        mlp_half=mlp_half,
        adapter_shape=adapter_shape,
        is_post_norm=lambda block: False,
        new_heads=("score", "qa_outputs"),
        query_and_value=("q_proj", "v_proj"),
        takes_parallel_adapter=True,
        causal_lm=CausalLM(model_class=causal_lm, body="model"),
    )
    for name, model_type, block, causal_lm in (
        ("LLaMA", "llama", LlamaDecoderLayer, LlamaForCausalLM),
        ("Mistral", "mistral", MistralDecoderLayer, MistralForCausalLM),
    )
)
