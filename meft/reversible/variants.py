"""F and G in MEFT1, MEFT2 and MEFT3 (Liao et al., NeurIPS 2023, figure 4).

              F                              G                             swap
    meft1     block + feed-forward adapter   reversible adapter            yes
    meft2     reversible adapter             block + feed-forward adapter  yes
    meft3     attention half + adapter       MLP half + adapter            no

All parts of the original block stay inside F or G: residuals, norms, dropouts. The
reversible adapter has no residual of its own, because the coupling supplies one.
Couplings that contain a piece of the backbone have the small scale, the others a scale
of 1. "Swap" means that the streams change places after every block; in a list of
couplings this only determines which stream a coupling changes. The stream changed last
is the fresh stream, which has just passed through a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from meft.backbone.family import Family
from meft.backbone.parallel import with_parallel
from meft.bottleneck import Bottleneck
from meft.reversible.call_arguments import Arguments
from meft.reversible.coupling import Branch, Context, Coupling, Part

SWAPS = {"meft1": True, "meft2": True, "meft3": False}

ADAPTERS = {
    "meft1": ("feed_forward", "reversible"),
    "meft2": ("reversible", "feed_forward"),
    "meft3": ("attention", "feed_forward"),
}
"""Names of the adapters in F and in G."""

HOLDS_BLOCK = {"meft1": (True, False), "meft2": (False, True), "meft3": (True, True)}
"""Whether F and G contain a piece of the backbone."""


def make_adapters(
    variant: str, make: Callable[[], Bottleneck], only_f: bool
) -> nn.ModuleDict:
    """Create the adapters of one block.

    Args:
        variant: `meft1`, `meft2` or `meft3`.
        make: function that creates one adapter.
        only_f: whether to leave out the adapter of G.

    Returns:
        The adapters by name, as in `ADAPTERS`.
    """
    names = ADAPTERS[variant][: 1 if only_f else 2]
    return nn.ModuleDict({name: make() for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class CouplingOptions:
    """The properties that the couplings of all blocks share."""

    variant: str
    scales: tuple[float, float]
    difference: bool
    """Whether couplings with a piece of the backbone subtract the source first."""


def couplings(
    options: CouplingOptions,
    family: Family,
    blocks: Mapping[int, tuple[nn.Module, nn.ModuleDict]],
    arguments: Sequence[Arguments],
) -> Iterator[Coupling]:
    """Yield two couplings per block, lowest first, or one if G has no adapter.

    Args:
        options: variant, scales and form of the couplings.
        family: the structure of the blocks.
        blocks: block and adapters by the block's index in the model, lowest first.
        arguments: what the model's loop passes to each block of the model.
    """
    for position, (index, (block, adapters)) in enumerate(blocks.items()):
        swapped = SWAPS[options.variant] and index % 2 == 1
        for side, name in enumerate(ADAPTERS[options.variant]):
            if name not in adapters:
                continue
            holds_block = HOLDS_BLOCK[options.variant][side]
            yield Coupling(
                target=side ^ swapped,
                branch=_branch(
                    options.variant,
                    side,
                    family,
                    block,
                    adapters[name],
                    arguments[index],
                ),
                scale=options.scales[side],
                difference=options.difference and holds_block,
                block=index,
                number=2 * index + side,
                starts=position == 0 and side == 0,
            )


def fresh_stream(variant: str, couplings: Sequence[Coupling]) -> int:
    """Return the index of the stream that has just passed through the top block."""
    side = max(side for side in range(2) if HOLDS_BLOCK[variant][side])
    return next(
        coupling.target
        for coupling in reversed(couplings)
        if coupling.number % 2 == side
    )


def _branch(
    variant: str,
    side: int,
    family: Family,
    block: nn.Module,
    adapter: nn.Module,
    arguments: Arguments,
) -> Branch:
    def attention(inside: nn.Module | None) -> Part:
        def function(hidden: Tensor, context: Context) -> Tensor:
            call = arguments.given(context)
            return family.attention_half(block, hidden, inside, **call)

        modules = (block,) if inside is None else (block, inside)
        return Part(function, modules)

    joined = with_parallel(block, adapter)
    mlp = Part(partial(family.mlp_half, block, adapter=joined), (block, adapter))
    if variant == "meft3":
        return Branch(mixing=attention(adapter)) if side == 0 else Branch(tokenwise=mlp)
    if HOLDS_BLOCK[variant][side]:
        return Branch(mixing=attention(None), tokenwise=mlp)
    return Branch(tokenwise=Part(adapter, (adapter,)))
