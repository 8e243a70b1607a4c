"""`ReversibleConfig`: everything that decides which function a reversible model is."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError
from meft.validate import at_least, one_of

PAPER_SCALES = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}
"""(lambda, beta) of the authors' GLUE runs, per variant."""
MAX_LOST_BITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversibleConfig:
    """How to make a model reversible. Illegal values raise `ConfigError`."""

    variant: str
    """`meft1`, `meft2` or `meft3`: what F and G are (`meft.reversible.variants`)."""
    bottleneck_size: int = 8
    """Inner width of every adapter."""
    arithmetic: str = "fixed"
    """`fixed`: integer streams with an exact inverse. `float`: the paper's, inverted by
    subtracting and dividing, whose gradients are wrong by about 1% in the lowest of 6
    blocks (0.1% with 5) and by all of their size in the lowest of 12."""
    lost_bits: int = 4
    """`fixed` only: k of the small scale 2^-k, 0 to 16. Kept for backward are k bits an
    element a block (2k for `meft3`). Every bit more halves the deviation from the
    starting point; 16 is gradient checkpointing of the unchanged backbone."""
    fraction_bits: int | None = None
    """`fixed` only: a stream's quantum is 2^-fraction_bits. None takes 14 for 16-bit
    compute and 18 for wider. Streams are 32-bit integers while no activation exceeds
    2^29 quanta (32,768 and 2,048), and 64-bit integers from the first forward on in
    which one does (limits of 1.4e14 and 8.8e12): the same function, for 8 bytes more an
    element of the pair of streams, and nothing more a block. A forward with larger
    values raises `UnsupportedCallError`, which names the block."""
    scale_1: float | None = None
    """`float` only: lambda, the factor on stream 1; None takes the paper's."""
    scale_2: float | None = None
    """`float` only: beta, the factor on stream 2; None takes the paper's."""
    coupling: str | None = None
    """`difference` scales what one block changed, `paper` the whole carried stream.
    None takes `difference` for `fixed` and `paper` for `float`."""
    span: tuple[int, int] | None = None
    """Blocks `span[0]` up to, not including, `span[1]` are rebuilt. Blocks below stay
    plain and frozen; blocks above get adapters too, but store their activations. None
    rebuilds all blocks (the paper's figure 7 compares such settings)."""
    backward: str = "rebuild"
    """`rebuild`: the method. `store`: its plain twin, under ordinary autograd."""
    mlp_chunks: int = 1
    """Parts of a batch's tokens in which what treats tokens alone (MLP, norms, adapter)
    is run and differentiated: a lower peak at the same number of operations."""
    gradient_dtype: str = "float32"
    """`fixed` only: `float32` or `bfloat16` for the gradients of streams."""
    side_buffer: str = "device"
    """`fixed` only: where the lost bits wait for the backward. `host` copies them to
    (pinned) host memory, so that nothing that grows with depth stays on the device;
    `ReversibleBlocks.ledger` counts the bytes."""
    on_mismatch: str = "raise"
    """`fixed` only: what to do if a branch gave other bits in the backward. `raise`;
    `skip`: this batch gives the stack and what is below it no gradients, and a warning
    (a task head above keeps its own, which autograd has computed before); `redo`:
    compute them with stored activations, and a warning (keeps the input of the stack
    for that)."""

    def __post_init__(self) -> None:
        one_of("variant", self.variant, PAPER_SCALES)
        one_of("arithmetic", self.arithmetic, ("fixed", "float"))
        one_of("backward", self.backward, ("rebuild", "store"))
        one_of("gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
        one_of("side_buffer", self.side_buffer, ("device", "host"))
        one_of("on_mismatch", self.on_mismatch, ("raise", "skip", "redo"))
        if self.coupling is not None:
            one_of("coupling", self.coupling, ("difference", "paper"))
        for name in ("bottleneck_size", "mlp_chunks"):
            at_least(name, getattr(self, name), 1)
        if not 0 <= self.lost_bits <= MAX_LOST_BITS:
            raise ConfigError(
                f"`lost_bits` must be 0 to {MAX_LOST_BITS}, got {self.lost_bits}"
            )
        if self.fraction_bits is not None and not 4 <= self.fraction_bits <= 24:
            raise ConfigError(
                f"`fraction_bits` must be 4 to 24, got {self.fraction_bits}"
            )
        for name in ("scale_1", "scale_2"):
            scale = getattr(self, name)
            if scale is not None and self.arithmetic == "fixed":
                raise ConfigError(
                    f"`{name}` is for `arithmetic='float'`; with `fixed` the small "
                    "scale is 2^-lost_bits: set `lost_bits`"
                )
            if scale == 0:
                raise ConfigError(f"`{name}` must not be 0: the inverse divides by it")
        if self.span is not None and not 0 <= self.span[0] < self.span[1]:
            raise ConfigError(
                "`span` must be (first, end) with 0 <= first < end, "
                f"got {self.span}; for a stack that stores every block, use "
                "`backward='store'`"
            )

    @property
    def scales(self) -> tuple[float, float]:
        """(lambda, beta)."""
        paper_1, paper_2 = PAPER_SCALES[self.variant]
        if self.arithmetic == "fixed":
            small = 2.0**-self.lost_bits
            return (small if paper_1 < 1 else 1.0, small if paper_2 < 1 else 1.0)
        return (
            paper_1 if self.scale_1 is None else self.scale_1,
            paper_2 if self.scale_2 is None else self.scale_2,
        )

    @property
    def is_difference(self) -> bool:
        """Whether the coupling scales differences."""
        return (self.coupling or _COUPLINGS[self.arithmetic]) == "difference"

    def same_function(self, other: "ReversibleConfig") -> bool:
        """Whether both describe one function, however its backward is computed."""
        neutral = dict.fromkeys(_HOW_ONLY, None)
        mine, theirs = self.to_json(), other.to_json()
        return mine | neutral == theirs | neutral

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReversibleConfig":
        """The inverse of `to_json`."""
        span = fields["span"]
        return cls(**fields | {"span": None if span is None else tuple(span)})


_HOW_ONLY = (
    "backward",
    "mlp_chunks",
    "gradient_dtype",
    "side_buffer",
    "on_mismatch",
)
_COUPLINGS = {"fixed": "difference", "float": "paper"}
