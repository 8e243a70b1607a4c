"""What F and G are in MEFT1, MEFT2 and MEFT3 (Liao et al., NeurIPS 2023, figure 4).

              F                              G                             swap
    meft1     block + feed-forward adapter   reversible adapter            yes
    meft2     reversible adapter             block + feed-forward adapter  yes
    meft3     attention half + adapter       MLP half + adapter            no

Everything of the original block stays inside F or G: residuals, norms, dropouts. The
reversible adapter has no residual of its own; the coupling supplies one. The stream
that has just been through a block (the fresh one) leaves the stack in slot 2, 1, 2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from meft.backbone import attention_half, mlp_half
from meft.bottleneck import Bottleneck
from meft.reversible.coupling import Function
from meft.reversible.twin import Branch

SWAPS = {"meft1": True, "meft2": True, "meft3": False}

ADAPTERS = {
    "meft1": ("feed_forward", "reversible"),
    "meft2": ("reversible", "feed_forward"),
    "meft3": ("attention", "feed_forward"),
}
"""Names of the adapters in F and in G."""


def make_adapters(variant: str, make: Callable[[], Bottleneck]) -> nn.ModuleDict:
    """The two adapters of one block."""
    return nn.ModuleDict({name: make() for name in ADAPTERS[variant]})


def branches(
    variant: str,
    block: BertLayer,
    adapters: nn.ModuleDict,
    mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Branch, Branch]:
    """F and G of one block, for one forward with its mask."""
    in_f, in_g = (adapters[name] for name in ADAPTERS[variant])
    dtype = block.output.dense.weight.dtype
    if variant == "meft3":
        attention = partial(attention_half, block, mask=mask, adapter=in_f, **kwargs)
        mlp = partial(mlp_half, block, adapter=in_g)
        return (
            Branch(_computed_in(dtype, attention), (block.attention, in_f)),
            Branch(_computed_in(dtype, mlp), (block.intermediate, block.output, in_g)),
        )
    reversible, feed_forward = (in_g, in_f) if variant == "meft1" else (in_f, in_g)

    def layer(x: Tensor) -> Tensor:
        return mlp_half(block, attention_half(block, x, mask, **kwargs), feed_forward)

    whole = Branch(_computed_in(dtype, layer), (block, feed_forward))
    alone = Branch(reversible, (reversible,))
    return (whole, alone) if variant == "meft1" else (alone, whole)


def _computed_in(dtype: torch.dtype, function: Function) -> Function:
    """`function` on a half-precision backbone's dtype, between float32 streams."""

    def cast(x: Tensor) -> Tensor:
        return function(x.to(dtype)).to(x.dtype)

    return cast
