"""`Family`: the structure of the blocks of one class."""

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
class Family:
    """The structure of the blocks of one class."""

    name: str
    """Name of the family for users, `BERT`."""
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

    def __reduce__(self) -> tuple[Callable[[type[nn.Module]], "Family"], tuple[Any]]:
        """Reduce to the class of the blocks; `copy` returns the family itself."""
        from meft.backbone.families import family_of  # that module imports this one

        return family_of, (self.block,)
