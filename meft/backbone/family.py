"""`Family`: all that the library knows about one class of blocks and its models.

`meft.backbone.families` has one module per structure of blocks, and lists all families.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meft.shapes import Hidden

Adapter = Callable[[Tensor], Tensor]
"""A function that is added in parallel with or after a half."""
AttentionHalf = Callable[..., Hidden]
"""(block, hidden, adapter, **call): the part of a block that mixes tokens."""
MlpHalf = Callable[..., Hidden]
"""(block, hidden, adapter): the position-wise layers of a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """The properties that an adapter takes from its backbone."""

    hidden_size: int
    activation: Callable[[Tensor], Tensor]
    dropout: float
    std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLM:
    """transformers' causal language model of a family.

    Its logits are the last hidden states times `lm_head`, without further changes.
    """

    model_class: type[Any]
    body: str
    """Name, in the model, of the module whose forward computes the last hidden states.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The structure of the blocks of one class, and of the models that have them."""

    name: str
    """Name of the family for users, `BERT`."""
    model_type: str
    """`model_type` of transformers' configs."""
    order: int
    """Position in lists, such as those of error messages."""
    block: type[nn.Module]
    attention_half: AttentionHalf
    mlp_half: MlpHalf
    adapter_shape: Callable[[Any, Any], AdapterShape]
    """Shape of an adapter, given a block and its model's config."""
    is_post_norm: Callable[[Any], bool]
    """Whether the block ends in a norm, which limits the size of the streams."""
    in_parts: tuple[str, ...] = ()
    """Names, in a block, of modules that the halves run in parts, like the block
    itself: the halves call their submodules and not the module
    (`meft.backbone.uncalled`).
    """
    refuse: Callable[[Any], str | None] = lambda block: None
    """Reason why this block cannot be run in halves; None if it can."""
    new_heads: tuple[str, ...]
    """Attributes of transformers' models that hold a task head without pre-trained
    weights, which must be trained. Poolers and language-model heads are pre-trained and
    stay frozen.
    """
    query_and_value: tuple[str, str]
    """Last parts of the names of the query and value projections, as LoRA takes them.
    """
    takes_parallel_adapter: bool = False
    """Whether a model has one list of blocks, whose class can be changed to add a
    parallel adapter (`meft.add_sparse_adapters`).
    """
    causal_lm: CausalLM | None = None
    """The causal language model whose loss can be chunked (`meft.chunk_loss`)."""
