"""Blocks of classes that `meft.backbone.families` does not list.

Many models have blocks with the structure of a listed family under the same names. A
block whose modules have the names of a layout, and that has no other modules with
parameters, is taken for one of that layout until its first forward compares the two
(`meft.backbone.proof`). A class can also be registered by its user.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from meft.backbone.families import FAMILIES, family_of
from meft.backbone.family import Family, the_first
from meft.backbone.layout import OPAQUE, Half, Layout
from meft.backbone.parallel import NAME as PARALLEL_ADAPTER
from meft.errors import ConfigError, UnsupportedModelError

_REGISTERED: dict[tuple[str, str], Family] = {}
_PATTERNS = tuple(
    dict.fromkeys(layout for family in FAMILIES for layout in family.layouts)
)
"""The layouts of listed families, the first family's first."""


def register_family(
    block: type[nn.Module],
    *,
    attention: Half | None = None,
    mlp: Half | None = None,
    cross: Half | None = None,
    is_parallel: bool = False,
    returns: int = 0,
    new_heads: tuple[str, ...] = (),
    query_and_value: tuple[str, ...] = (),
) -> None:
    """Describe a class of blocks, so that models of it can be converted.

    Needed only for a class that is refused without: those of listed families, and all
    whose modules have the same names, are known. A wrong description is refused by the
    first forward, which compares it with the block's own `forward`. Without `attention`
    and `mlp`, blocks are called as they are, which needs
    `ReversibleConfig(adapter=None)`. Registering a class again replaces its
    description.

    Args:
        block: the class of the blocks, such as `MyDecoderLayer`.
        attention: the half that mixes tokens, `Half("norm_1", "attention dropout")`.
        mlp: the position-wise half, `Half("norm_2", "mlp")`.
        cross: attention to an encoder, if there is one.
        is_parallel: whether both halves read the input of the block.
        returns: the length of the tuple that a block returns, 0 if it returns a tensor.
        new_heads: names of the attributes of models that hold a task head to be
            trained, such as `classifier`.
        query_and_value: last parts of the names of the query and value projections.

    Raises:
        ConfigError: `block` is not a class of modules, or a half has no chain.
    """
    if not (inspect.isclass(block) and issubclass(block, nn.Module)):
        raise ConfigError(
            f"`block` must be a class derived from `nn.Module`, got {block!r}: pass "
            "the class of the blocks, `type(model.model.layers[0])`"
        )
    if (attention is None) is not (mlp is None):
        raise ConfigError(
            "`attention` and `mlp` must both be given, or none of them for blocks that "
            f"are called as they are, got {attention!r} and {mlp!r}"
        )
    for name, half in (("attention", attention), ("mlp", mlp), ("cross", cross)):
        if half is not None and not (isinstance(half, Half) and half.chain.split()):
            raise ConfigError(
                f"`{name}` must be a `meft.Half` whose `chain` has the names of the "
                f"modules that are called one after the other, got {half!r}"
            )
    layout = Layout(
        attention=attention or Half(),
        mlp=mlp or Half(),
        cross=cross,
        is_parallel=is_parallel,
        returns=returns,
    )
    _REGISTERED[block.__module__, block.__qualname__] = Family(
        name=block.__name__,
        model_type="",
        defined_in=block.__module__,
        order=len(FAMILIES),
        block=block.__qualname__,
        layouts=(layout,),
        new_heads=new_heads,
        query_and_value=query_and_value,
        takes_parallel_adapter=attention is not None,
        is_guess=attention is None,
    )


def family_for(block: nn.Module) -> Family | None:
    """Return the family of a block: registered, listed, or guessed from its names.

    Args:
        block: a block. That of a class derived from a known one has its family.
    """
    for kind in type(block).__mro__:
        registered = _REGISTERED.get((kind.__module__, kind.__qualname__))
        found = registered or family_of(kind)
        if found is not None:
            return found
    kind = getattr(block, "plain", type(block))
    fitting = tuple(p for p in _PATTERNS if _fits(p, block))
    if not fitting:
        return None
    like = next(family for family in FAMILIES if fitting[0] in family.layouts)
    return replace(
        like,
        name=kind.__name__,
        model_type="",
        defined_in=kind.__module__,
        order=len(FAMILIES),
        block=kind.__qualname__,
        layouts=fitting,
        choose=the_first,
        causal_lm=None,
        is_guess=True,
    )


def opaque_family(blocks: Sequence[nn.Module]) -> Family:
    """Return a family of blocks of any classes, which are called themselves.

    Args:
        blocks: the blocks of one list.
    """
    return Family(
        name=" and ".join(dict.fromkeys(type(block).__name__ for block in blocks)),
        model_type="",
        defined_in=type(blocks[0]).__module__,
        order=len(FAMILIES),
        block=type(blocks[0]).__qualname__,
        layouts=(OPAQUE,),
        new_heads=(),
        query_and_value=(),
        is_guess=True,
    )


def is_checkpointed(block: nn.Module) -> bool:
    """Return whether transformers can checkpoint a block, and nothing inside it.

    Such a block takes hidden states, and returns them.
    """
    inside = (part for part in block.modules() if part is not block)
    return _is_layer(block) and not any(map(_is_layer, inside))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def nearest(block: nn.Module) -> str:
    """Describe what a block lacks of the layout that it is most like.

    Args:
        block: a block of an unknown class.
    """

    def shared(layout: Layout) -> int:
        return len(set(layout.modules)) - len(set(layout.missing(block)))

    serial = [layout for layout in _PATTERNS if not layout.is_parallel]
    layout = max(serial, key=lambda p: (shared(p), -len(p.unused(block))))
    kind = type(block).__name__
    article = "an" if kind[0] in "AEIOU" else "a"
    if shared(layout) <= 0:
        return f"{article} {kind} is like none of theirs"
    like = next(family.name for family in FAMILIES if layout in family.layouts)
    missing = dict.fromkeys(name.lstrip("+~*") for name in layout.missing(block))
    parts = []
    if missing:
        parts.append("lacks " + ", ".join(f"`{name}`" for name in missing))
    if layout.unused(block):
        parts.append("also has " + ", ".join(f"`{n}`" for n in layout.unused(block)))
    differences = " and ".join(parts)
    return f"{article} {kind} is most like a block of {like}, but {differences}"


def _fits(layout: Layout, block: nn.Module) -> bool:
    unused = [name for name in layout.unused(block) if name != PARALLEL_ADAPTER]
    return not layout.missing(block) and not unused


def refuse_missing(family: Family, block: nn.Module) -> None:
    """Refuse a block without the modules that its family's layout names.

    Raises:
        UnsupportedModelError: a name is missing.
    """
    missing = family.layout(block).missing(block)
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise UnsupportedModelError(
            f"a {type(block).__name__} has no {names}, which the description of "
            f"{family.name} names; see `meft.register_family`"
        )
