"""`ReversibleConfig`: everything that decides which function a reversible model is."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError

PAPER_SCALES = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}
"""(lambda, beta) of the authors' GLUE runs, per variant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversibleConfig:
    """How to make a model reversible. Illegal values raise `ConfigError`."""

    variant: str
    """`meft1`, `meft2` or `meft3`: what F and G are (`meft.reversible.variants`)."""
    bottleneck_size: int = 8
    """Inner width of every adapter."""
    scale_1: float | None = None
    """lambda, the factor on stream 1; None takes the paper's for the variant."""
    scale_2: float | None = None
    """beta, the factor on stream 2; None takes the paper's for the variant."""
    span: tuple[int, int] | None = None
    """Blocks `span[0]` up to, not including, `span[1]` are rebuilt. Blocks below stay
    plain and frozen; blocks above get adapters too, but store their activations. None
    rebuilds all blocks (the paper's figure 7 compares such settings)."""
    arithmetic: str = "float"
    """`float`: floating-point streams, inverted by subtracting and dividing."""
    backward: str = "rebuild"
    """`rebuild`: the method. `store`: its plain twin, under ordinary autograd."""

    def __post_init__(self) -> None:
        _one_of("variant", self.variant, PAPER_SCALES)
        _one_of("arithmetic", self.arithmetic, ("float",))
        _one_of("backward", self.backward, ("rebuild", "store"))
        if self.bottleneck_size < 1:
            raise ConfigError(
                f"`bottleneck_size` must be at least 1, got {self.bottleneck_size}"
            )
        for name in ("scale_1", "scale_2"):
            if getattr(self, name) == 0:
                raise ConfigError(f"`{name}` must not be 0: the inverse divides by it")
        if self.span is not None and not 0 <= self.span[0] < self.span[1]:
            raise ConfigError(
                "`span` must be (first, end) with 0 <= first < end, "
                f"got {self.span}; for a stack that stores every block, use "
                "`backward='store'`"
            )

    @property
    def scales(self) -> tuple[float, float]:
        """(lambda, beta) with the paper's values filled in."""
        paper_1, paper_2 = PAPER_SCALES[self.variant]
        return (
            paper_1 if self.scale_1 is None else self.scale_1,
            paper_2 if self.scale_2 is None else self.scale_2,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReversibleConfig":
        """The inverse of `to_json`."""
        span = fields["span"]
        return cls(**fields | {"span": None if span is None else tuple(span)})


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    names = list(valid)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"`{name}` must be one of {names}, got {value!r}{hint}")
