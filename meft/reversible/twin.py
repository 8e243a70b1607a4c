"""The plain twin: a stack of couplings, run forward, nothing clever.

Under ordinary autograd this is `backward="store"`, the reference of every test; without
grad it is the forward half of `backward="rebuild"`. Both therefore compute the same
function to the last bit, dropout masks included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from meft.reversible.coupling import Function, couple
from meft.reversible.probe import Probe
from meft.reversible.rng import replayed
from meft.shapes import Hidden


@dataclass(frozen=True, slots=True)
class Branch:
    """F or G of one block: the function, and the modules whose parameters it uses."""

    function: Function
    modules: tuple[nn.Module, ...]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the branch uses and that want a gradient."""
        parameters = (p for module in self.modules for p in module.parameters())
        return [p for p in parameters if p.requires_grad]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A run of blocks as couplings: plain arguments, made anew for every forward."""

    branches: Sequence[tuple[Branch, Branch]]
    """(F, G) per block, lowest first."""
    scale_1: float
    scale_2: float
    swap: bool
    """Whether the streams change places after every block."""
    seed: int | None
    """Seed of the dropout masks; None in evaluation."""
    first_block: int
    """Index of the lowest block in the model, so that its masks are its own."""

    def replayable(self, index: int, side: int) -> Function:
        """F (`side` 0) or G (1) of block `index`, with random numbers of its own."""
        function = self.branches[index][side].function
        number = 2 * (self.first_block + index) + side

        def apply(x: Tensor) -> Tensor:
            with replayed(self.seed, number, x.device):
                return function(x)

        return apply


def run(
    stack: Stack, x1: Hidden, x2: Hidden, probe: Probe | None = None
) -> tuple[Hidden, Hidden]:
    """All couplings, lowest first. A probe is shown the input pair of every block."""
    for index in range(len(stack.branches)):
        if probe is not None:
            probe.expect(index, x1, x2)
        f, g = stack.replayable(index, 0), stack.replayable(index, 1)
        x1, x2 = couple(x1, x2, f, g, stack.scale_1, stack.scale_2)
        if stack.swap:
            x1, x2 = x2, x1
    return x1, x2
