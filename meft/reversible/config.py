"""`ReversibleConfig`: the fields that define the function of a reversible model."""

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError
from meft.validate import (
    Expectation,
    check_fields,
    checked,
    integer,
    nonzero_number,
    one_of,
    or_none,
    suggests_fields,
)

PAPER_SCALES = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}
"""The factors (lambda, beta) of the authors' GLUE runs, per variant."""
MAX_LOST_BITS = 16
_LOST_BITS = {"bottleneck": 4, None: 8}
"""Lost bits that None selects, by `adapter`."""


@suggests_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class ReversibleConfig:
    """Configuration of `meft.make_reversible`.

    A reversible block couples two streams, each of the shape of the hidden states, by
    two functions F and G, so that its inputs can be rebuilt from its outputs. The
    variants are those of Liao et al. (NeurIPS 2023) and differ in what F and G are:

    - `meft1`: F is the pre-trained block with an adapter after its feed-forward, and G
      is an adapter alone.
    - `meft2`: the reverse. F is an adapter alone, and G is the pre-trained block with
      an adapter.
    - `meft3`: F is the attention half of the block and G its feed-forward half, each
      with an adapter. Both couplings scale a stream, so it keeps twice the lost bits.

    With `adapter=None` there are no adapters and no variants: F is the pre-trained
    block and there is no G. What trains is then what `requires_grad` says before the
    conversion: LoRA and other methods of peft inside the blocks, or all parameters.

    Use `meft1` unless you compare variants: `meft1` and `meft2` keep the least for the
    backward, `meft3` had a peak 3 to 10 % lower on an H200, and most of our
    measurements are of `meft1`. In the paper's arithmetic the three score within a few
    percentage points of each other in `reports/published/reference`.

    Attributes:
        variant (str | None): `meft1`, `meft2` or `meft3`, as above. Required, unless
            `adapter` is None. Default: `None`.
        adapter (str | None): The adapters of each block. `bottleneck`: those of the
            paper, two linear layers with an activation in between. None: none, to make
            a model reversible that trains otherwise; `fixed` only. Default:
            `'bottleneck'`.
        bottleneck_size (int): Inner width of every adapter, in features, at least 1.
            Raise it if the model underfits. Default: `8`.
        arithmetic (str): Number format of the streams. `fixed`: integers with an exact
            inverse, so that gradients equal those of stored activations in every bit.
            `float`: floating point as in the paper, inverted by subtraction and
            division. Its gradients have errors of about 1% in the lowest of 6 blocks
            (0.1% with 5) and of 100% in the lowest of 12. Use `float` only to compare
            with the paper. Default: `'fixed'`.
        lost_bits (int | None): `fixed` only: k of the small scale 2^-k, 0 to 16. None
            selects 4, and 8 without adapters, where a model is expected to start at
            the pre-trained one. k bits per element and block (2k for `meft3`, except
            in parallel blocks) are kept for the backward. Each additional bit halves
            the deviation of the converted model from the pre-trained one; 16
            corresponds to gradient checkpointing of the unchanged backbone. Lower it
            to save memory; raise it if the first loss is far from that of the
            pre-trained model. Default: `None`.
        fraction_bits (int | None): `fixed` only: the quantum of a stream is
            2^-fraction_bits, 4 to 24. None selects 14 for 16-bit compute and 18 for
            wider dtypes. Streams are 32-bit integers while no activation exceeds 2^29
            quanta (32,768 and 2,048), and 64-bit integers from the first forward on in
            which one does (limits of 1.4e14 and 8.8e12). Both compute the same
            function; 64-bit streams take 8 more bytes per element of the pair of
            streams. A forward with larger values raises `UnsupportedCallError`, which
            names the block; in that case lower `fraction_bits`. Default: `None`.
        scale_1 (float | None): `float` only: lambda, the factor on stream 1, finite and
            not 0. None selects the paper's value. Default: `None`.
        scale_2 (float | None): `float` only: beta, the factor on stream 2, finite and
            not 0. None selects the paper's value. Default: `None`.
        coupling (str | None): `difference` scales the change made by one block, `paper`
            the whole carried stream. None selects `difference` for `fixed` and `paper`
            for `float`. Change it only to compare. Default: `None`.
        span (tuple[int, int] | None): Blocks from `span[0]` up to, not including,
            `span[1]` are rebuilt. Blocks below stay plain and frozen; blocks above get
            adapters too, but store their activations. None rebuilds all blocks (figure
            7 of the paper compares such settings). Default: `None`.
        backward (str): `rebuild`: the reversible backward pass. `store`: the same
            function with stored activations under ordinary autograd, for comparison and
            debugging. Default: `'rebuild'`.
        mlp_chunks (int): Number of parts into which the tokens of the batch are split
            when the position-wise layers (MLP, norms, adapter) are recomputed and
            differentiated, at least 1. Norms that transformers computes in float32,
            before and inside attention, run in as many parts too, and once more in the
            backward. Raise it to lower peak memory. Default: `1`.
        gradient_dtype (str): `fixed` only: `float32` or `bfloat16`, the dtype of the
            gradients of streams. `bfloat16` halves their memory and rounds them.
            Default: `'float32'`.
        side_buffer (str): `fixed` only: where the lost bits are kept until the
            backward. `device`, or `host`: in (pinned) host memory, so that no memory
            that grows with depth stays on the device; `ReversibleBlocks.ledger` counts
            the bytes. Default: `'device'`.
        on_mismatch (str): `fixed` only: what to do if a branch gives other bits in the
            backward than in the forward. `raise` raises `ReconstructionError`. `skip`
            issues a warning and returns no gradients for the stack and the layers below
            it in this batch (a task head above keeps its gradients, which autograd has
            computed before). `redo` issues a warning and computes the gradients with
            stored activations (it keeps the input of the stack for that). Default:
            `'raise'`.

    Raises:
        ConfigError: a value has the wrong type, is out of range or has no effect.
    """

    variant: str | None = None
    adapter: str | None = "bottleneck"
    bottleneck_size: int = 8
    arithmetic: str = "fixed"
    lost_bits: int | None = None
    fraction_bits: int | None = None
    scale_1: float | None = None
    scale_2: float | None = None
    coupling: str | None = None
    span: tuple[int, int] | None = None
    backward: str = "rebuild"
    mlp_chunks: int = 1
    gradient_dtype: str = "float32"
    side_buffer: str = "device"
    on_mismatch: str = "raise"

    def __post_init__(self) -> None:
        check_fields(self, _EXPECTED)
        if self.lost_bits is None:
            object.__setattr__(self, "lost_bits", _LOST_BITS[self.adapter])
        if self.adapter is None:
            self._refuse_adapter_fields()
        elif self.variant is None:
            raise ConfigError(
                "`variant` is missing: use 'meft1', unless you compare it with 'meft2' "
                "or 'meft3'. For a model that trains without adapters of its own, as "
                "one with LoRA, set `adapter=None` instead"
            )
        for name in ("scale_1", "scale_2"):
            if getattr(self, name) is not None and self.arithmetic == "fixed":
                raise ConfigError(
                    f"`{name}` is for `arithmetic='float'`; with `fixed` the small "
                    "scale is 2^-lost_bits: set `lost_bits`"
                )

    def _refuse_adapter_fields(self) -> None:
        """Refuse fields that have no effect without adapters."""
        for name, only in (("variant", None), ("bottleneck_size", 8)):
            if getattr(self, name) != only:
                raise ConfigError(
                    f"`{name}` has no effect with `adapter=None`: leave it out"
                )
        if self.arithmetic != "fixed":
            raise ConfigError(
                "`adapter=None` is for `arithmetic='fixed'`: the scales of the paper's "
                "arithmetic change the pre-trained model, and adapters make up for it"
            )

    @property
    def scales(self) -> tuple[float, float]:
        """Return (lambda, beta)."""
        paper_1, paper_2 = PAPER_SCALES[self.variant or "meft1"]
        if self.arithmetic == "fixed":
            assert self.lost_bits is not None  # it is set when the config is made
            small = 2.0**-self.lost_bits
            return (small if paper_1 < 1 else 1.0, small if paper_2 < 1 else 1.0)
        return (
            paper_1 if self.scale_1 is None else self.scale_1,
            paper_2 if self.scale_2 is None else self.scale_2,
        )

    @property
    def is_difference(self) -> bool:
        """Return whether the coupling scales differences."""
        return (self.coupling or _COUPLINGS[self.arithmetic]) == "difference"

    def function(self) -> dict[str, Any]:
        """Return the fields that define the function, without those of its computation.

        Defaults that None selects are filled in where they do not depend on the model,
        and fields without effect are None.
        """
        is_fixed = self.arithmetic == "fixed"
        scale_1, scale_2 = (None, None) if is_fixed else self.scales
        without = {} if self.adapter else {"adapter": None}
        return without | {
            "variant": self.variant,
            "bottleneck_size": self.bottleneck_size if self.adapter else None,
            "arithmetic": self.arithmetic,
            "lost_bits": self.lost_bits if is_fixed else None,
            "fraction_bits": self.fraction_bits if is_fixed else None,
            "scale_1": scale_1,
            "scale_2": scale_2,
            "coupling": self.coupling or _COUPLINGS[self.arithmetic],
            "span": self.span,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ReversibleConfig":
        """Create a config from the output of `to_json`.

        Raises:
            ConfigError: a field is unknown or missing, or has an illegal value.
        """
        # Earlier versions wrote no `adapter`: there was one kind.
        return cls(**checked({"adapter": "bottleneck", **fields}, _EXPECTED))


_COUPLINGS = {"fixed": "difference", "float": "paper"}


def _span(name: str, value: Any) -> tuple[int, int]:
    try:
        first, end = (operator.index(block) for block in value)
    except (TypeError, ValueError):
        first, end = 0, 0
    if not 0 <= first < end:
        raise ConfigError(
            f"`{name}` must be two integers (first, end) with 0 <= first < end, got "
            f"{value!r}; for a stack that stores every block, use `backward='store'`"
        )
    return first, end


_EXPECTED: dict[str, Expectation] = {
    "variant": or_none(one_of(PAPER_SCALES)),
    "adapter": or_none(one_of(("bottleneck",))),
    "bottleneck_size": integer(1),
    "arithmetic": one_of(("fixed", "float")),
    "lost_bits": or_none(integer(0, MAX_LOST_BITS)),
    "fraction_bits": or_none(integer(4, 24)),
    "scale_1": or_none(nonzero_number),
    "scale_2": or_none(nonzero_number),
    "coupling": or_none(one_of(("difference", "paper"))),
    "span": or_none(_span),
    "backward": one_of(("rebuild", "store")),
    "mlp_chunks": integer(1),
    "gradient_dtype": one_of(("float32", "bfloat16")),
    "side_buffer": one_of(("device", "host")),
    "on_mismatch": one_of(("raise", "skip", "redo")),
}
