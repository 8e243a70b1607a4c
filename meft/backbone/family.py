"""`Family`: how the blocks of one kind are put together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meft.shapes import Hidden

Adapter = Callable[[Tensor], Tensor]
"""What is added beside or after a half, as a function of its input."""
AttentionHalf = Callable[..., Hidden]
"""(block, hidden, adapter, **call): what mixes tokens in one block."""
MlpHalf = Callable[..., Hidden]
"""(block, hidden, adapter): what treats each token alone in one block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """What an adapter takes from the backbone it is put into."""

    hidden_size: int
    activation: Callable[[Tensor], Tensor]
    dropout: float
    std: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Blocks of one class."""

    name: str
    """As its users write it, `BERT`."""
    block: type[nn.Module]
    attention_half: AttentionHalf
    mlp_half: MlpHalf
    adapter_shape: Callable[[Any, Any], AdapterShape]
    """Of a block and its model's config."""
    is_post_norm: Callable[[Any], bool]
    """Whether the block ends in a norm: then streams keep their size by themselves."""
    in_parts: tuple[str, ...] = ()
    """Names, in a block, of modules that the halves run in parts, as the block itself:
    they call what is inside and not the module (`meft.backbone.uncalled`)."""
    refuse: Callable[[Any], str | None] = lambda block: None
    """Why this very block cannot be taken apart; None if it can."""

    def __reduce__(self) -> tuple[Callable[[type[nn.Module]], "Family"], tuple[Any]]:
        """A family is pickled by the class of its blocks, and copied not at all."""
        from meft.backbone.families import family_of  # which imports this module

        return family_of, (self.block,)
