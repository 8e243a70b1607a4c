"""The supported families: one module per structure of blocks, found automatically.

To add a family, add a module here that has a tuple `FAMILIES`. All modules have the
same functions:

    attention_half(block, hidden, adapter, **call)   the part that mixes tokens
    mlp_half(block, hidden, adapter)                 the position-wise layers
    adapter_shape(block, config)                     the shape of an adapter

Each half is complete: its norm, its residual and its dropout are inside. `call` holds
the arguments other than the hidden states that the model's loop passes to a block, by
name. If an adapter is given, it is placed as in the paper (Liao et al., NeurIPS 2023,
and their code): after attention it is sequential with its own skip connection; at the
feed-forward it runs in parallel, on the same input.
"""

import copyreg
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from meft.backbone.family import Family


def _find() -> tuple[Family, ...]:
    """Return the families of all modules of this package, by `Family.order`."""
    found: list[Family] = []
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{name}").FAMILIES
    return tuple(sorted(found, key=lambda family: family.order))


FAMILIES = _find()
"""All families. A family may have several classes of blocks, an entry each."""


def family_of(block: type[nn.Module]) -> Family:
    """Return the family whose blocks are of class `block`."""
    return next(family for family in FAMILIES if family.block is block)


def _reduce(family: Family) -> tuple[Callable[..., Family], tuple[Any]]:
    """Reduce to the class of the blocks; `copy` returns the family itself."""
    return family_of, (family.block,)


# Registered here, because `Family.__reduce__` would have to import this package.
copyreg.pickle(Family, _reduce)
