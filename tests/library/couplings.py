"""A coupling by itself, for tests of the arithmetics."""

from meft.reversible.coupling import Branch, Coupling


def coupling(scale: float, difference: bool, starts: bool = False) -> Coupling:
    """A coupling whose branch is never run."""
    return Coupling(
        target=0,
        branch=Branch(),
        scale=scale,
        difference=difference,
        block=0,
        number=0,
        starts=starts,
    )
