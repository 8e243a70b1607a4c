"""F and G in MEFT1, MEFT2 and MEFT3 (Liao et al., NeurIPS 2023, figure 4).

              F                              G                             swap
    meft1     block + feed-forward adapter   reversible adapter            yes
    meft2     reversible adapter             block + feed-forward adapter  yes
    meft3     attention half + adapter       MLP half + adapter            no

Without adapters, F is the block and there is no G, so the streams swap as in `meft1`.
In a parallel block (`meft.backbone.layout`) the feed-forward must read the input of the
block, not the output of a coupling, so in `meft3` F is the whole block with both
adapters, there is no G, and the streams swap.

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
from typing import Any, NamedTuple

from torch import Tensor, nn

from meft.backbone.called import call_block, is_sharded
from meft.backbone.family import Family
from meft.backbone.norm_parts import norms_in_parts
from meft.backbone.parallel import is_divided, with_parallel
from meft.backbone.uncalled import must_be_called
from meft.bottleneck import Bottleneck
from meft.reversible.call_arguments import Arguments
from meft.reversible.coupling import Branch, Context, Coupling, Part

ADAPTERS = {
    "meft1": ("feed_forward", "reversible"),
    "meft2": ("reversible", "feed_forward"),
    "meft3": ("attention", "feed_forward"),
}
"""Names of the adapters in F and in G."""


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

    variant: str | None
    """None without adapters."""
    scales: tuple[float, float]
    difference: bool
    """Whether couplings with a piece of the backbone subtract the source first."""
    num_chunks: int
    """Number of parts of the tokens in which norms of the half that mixes tokens run.
    """


class _Step(NamedTuple):
    """A coupling of one block, before it is known which stream it changes."""

    side: int
    """0 for F, 1 for G."""
    branch: Branch
    holds_block: bool
    """Whether the branch contains a piece of the backbone."""


def couplings(
    options: CouplingOptions,
    family: Family,
    blocks: Mapping[int, tuple[nn.Module, nn.ModuleDict]],
    arguments: Sequence[Arguments],
) -> Iterator[Coupling]:
    """Yield the couplings of every block, lowest first.

    These are two per block, or one if G has no adapter.

    Args:
        options: variant, scales and form of the couplings.
        family: the structure of the blocks.
        blocks: block and adapters by the block's index in the model, lowest first.
        arguments: what the model's loop passes to each block of the model.
    """
    for position, (index, (block, adapters)) in enumerate(blocks.items()):
        is_parallel = family.layout(block).is_parallel
        swaps = options.variant != "meft3" or is_parallel
        swapped = swaps and index % 2 == 1
        steps = _steps(options, family, block, adapters, arguments[index])
        for side, branch, holds_block in steps:
            yield Coupling(
                target=side ^ swapped,
                branch=branch,
                scale=options.scales[side],
                difference=options.difference and holds_block,
                block=index,
                number=2 * index + side,
                starts=position == 0 and side == 0,
                holds_block=holds_block,
            )


def fresh_stream(couplings: Sequence[Coupling]) -> int:
    """Return the index of the stream that has just passed through the top block."""
    return next(c.target for c in reversed(couplings) if c.holds_block)


def _steps(
    options: CouplingOptions,
    family: Family,
    block: nn.Module,
    adapters: nn.ModuleDict,
    arguments: Arguments,
) -> Iterator[_Step]:
    variant = options.variant
    is_parallel = family.layout(block).is_parallel

    def attention(inside: nn.Module | None) -> Part:
        def function(hidden: Tensor, context: Context) -> Tensor:
            call = arguments.given(context)
            with norms_in_parts(block, options.num_chunks):
                return family.attention_half(block, hidden, inside, **call)

        return Part(function, (block,) if inside is None else (block, inside))

    def mlp() -> Part:
        adapter = adapters["feed_forward"] if "feed_forward" in adapters else None
        joined = with_parallel(block, adapter)
        function = partial(family.mlp_half, block, adapter=joined)
        return Part(function, (block,) if adapter is None else (block, adapter))

    def called() -> Branch:
        inside = adapters["feed_forward"] if "feed_forward" in adapters else None

        def in_its_place(hidden_states: Tensor, **call: Any) -> Tensor:
            return family.whole(block, hidden_states, inside, **call)

        def function(hidden: Tensor, context: Context) -> Tensor:
            call = arguments.given(context)
            replaced = None if inside is None else in_its_place
            output = call_block(block, hidden, call, replaced)
            return family.layout(block).hidden_of(block, hidden, output)

        modules = (block,) if inside is None else (block, inside)
        return Branch(mixing=Part(function, modules), is_sharded=is_sharded(block))

    def whole(inside: nn.Module | None = None) -> Branch:
        is_opaque = family.layout(block).is_opaque  # only without adapters
        if is_opaque or must_be_called(block):  # in `meft3` it has been refused
            return called()
        return Branch(
            mixing=attention(inside),
            tokenwise=mlp(),
            is_sum=is_parallel,
            is_divided=is_divided(block),
        )

    if variant == "meft3":
        if is_parallel:
            yield _Step(0, whole(adapters["attention"]), True)
        else:
            yield _Step(0, Branch(mixing=attention(adapters["attention"])), True)
            branch = Branch(tokenwise=mlp(), is_divided=is_divided(block))
            yield _Step(1, branch, True)
        return
    if variant == "meft2":
        yield _Step(0, _alone(adapters["reversible"]), False)
        yield _Step(1, whole(), True)
        return
    yield _Step(0, whole(), True)
    if "reversible" in adapters:
        yield _Step(1, _alone(adapters["reversible"]), False)


def _alone(adapter: nn.Module) -> Branch:
    return Branch(tokenwise=Part(adapter, (adapter,)))
