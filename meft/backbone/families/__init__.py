"""The supported families: one module per structure of blocks, found automatically.

To add a family, add a module here that has a tuple `FAMILIES`, or an entry to the one
of a module whose blocks have the same modules under the same names. A `Layout` says
what the halves of a block are (`meft.backbone.layout`).
"""

import copyreg
import importlib
import pkgutil
from typing import Any

from meft.backbone.family import Family


def _find() -> tuple[Family, ...]:
    """Return the families of all modules of this package, by `Family.order`."""
    found: list[Family] = []
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{name}").FAMILIES
    return tuple(sorted(found, key=lambda family: family.order))


FAMILIES = _find()
"""All families. A family may have several classes of blocks, an entry each."""
_BY_CLASS = {(family.module, family.block): family for family in FAMILIES}


def family_of(block: type[Any]) -> Family | None:
    """Return the family whose blocks are of class `block`; None if there is none."""
    return _BY_CLASS.get((block.__module__, block.__qualname__))


def _named(module: str, block: str) -> Family:
    return _BY_CLASS[module, block]


def _reduce(family: Family) -> Any:
    """Reduce to the name of the class of the blocks; `copy` returns the family."""
    if _BY_CLASS.get((family.module, family.block)) is not family:
        return family.__reduce_ex__(2)  # one that is not in the table
    return _named, (family.module, family.block)


# Registered here, because `Family.__reduce__` would have to import this package.
copyreg.pickle(Family, _reduce)
