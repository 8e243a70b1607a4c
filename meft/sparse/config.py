"""`SparseConfig`: everything that decides what a sparse adapter computes, and where."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError
from meft.sparse.adam import UPDATES
from meft.validate import at_least, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """How to add sparse adapters. Illegal values raise `ConfigError`."""

    num_neurons: int = 6400
    """Neurons (pairs of key and value) a block, r."""
    top_k_neurons: int = 64
    """Neurons that a token keeps, K, by the size of its score."""
    num_experts: int | None = None
    """Equal groups of neurons that a router chooses among, N; 0 for none: then every
    neuron is scored. None takes the authors' 4 * ceil(sqrt(num_neurons))."""
    top_k_experts: int = 8
    """Experts that a token is routed to."""
    gate: str = "logit"
    """What an expert's router score does to the scores of its neurons. `logit`: factor
    (the authors' choice); `softmax`: factor after a softmax over all experts; `none`:
    it only chooses, and the router cannot learn."""
    semantics: str = "token_topk"
    """`token_topk`: a token is answered by the neurons that it chose (the authors' code
    behind their accuracies). `union`: by all that any token of the batch chose, without
    a gate (the paper's algorithm 1)."""
    placement: str = "offloaded"
    """Where rows live: in host memory (`offloaded`), or on the device (`resident`)."""
    wire_dtype: str | None = None
    """Of rows and gradients on their way: `float32`, `bfloat16` or `float16`. Master
    rows are float32 always. None takes the backbone's."""
    device_bytes: int = 2**30
    """What rows and their gradients may take on the device, of all blocks together:
    seven eighths for the cache, the rest for the rows that are being computed with. If
    that eighth does not hold what a batch chose in a block, rows are computed with a
    piece at a time, and sums over pieces round differently."""
    cache: str = "steps"
    """How long a row stays on the device: `off`, only while it is computed with, so its
    gradient travels at once; `window`, until the next optimizer step; `steps`, for as
    long as its value does not change."""
    prefetch: bool = True
    """Fetch what the next block used last time while this one computes."""
    update: str = "catchup"
    """What happens to rows that have no gradient in an optimizer step: `dense`, they
    take the step; `lazy`, they stand still; `catchup`, they take it when they are next
    needed, in the bits of `dense` at the cost of what is touched."""

    def __post_init__(self) -> None:
        one_of("gate", self.gate, ("logit", "softmax", "none"))
        one_of("semantics", self.semantics, ("token_topk", "union"))
        one_of("placement", self.placement, ("offloaded", "resident"))
        one_of("cache", self.cache, ("steps", "window", "off"))
        one_of("update", self.update, UPDATES)
        if self.wire_dtype is not None:
            one_of("wire_dtype", self.wire_dtype, ("float32", "bfloat16", "float16"))
        for name in ("num_neurons", "top_k_neurons", "top_k_experts", "device_bytes"):
            at_least(name, getattr(self, name), 1)
        if self.top_k_neurons > self.num_neurons:
            raise ConfigError(
                f"`top_k_neurons` is {self.top_k_neurons}, but there are only "
                f"{self.num_neurons} neurons (`num_neurons`)"
            )
        if self.num_experts != 0:
            self._check_experts()

    def _check_experts(self) -> None:
        experts, neurons = self.experts, self.num_neurons
        at_least("num_experts", experts, 0)
        if neurons % experts:
            default = " by default" if self.num_experts is None else ""
            raise ConfigError(
                f"`num_experts` is {experts}{default}, which does not divide "
                f"`num_neurons` {neurons}. Nearest `num_experts` that do: "
                f"{_either_side(experts, lambda n: neurons % n == 0, neurons)}; nearest"
                f" `num_neurons` for `num_experts=None`: "
                f"{_either_side(neurons, _has_default_experts, 16 * neurons)}"
            )
        if self.top_k_experts > experts:
            raise ConfigError(
                f"`top_k_experts` is {self.top_k_experts}, but there are only "
                f"{experts} experts (`num_experts`)"
            )

    @property
    def experts(self) -> int:
        """N, 0 where there is no router."""
        if self.num_experts is None:
            return _default_experts(self.num_neurons)
        return self.num_experts

    @property
    def num_candidates(self) -> int:
        """Neurons that a token scores."""
        if not self.experts:
            return self.num_neurons
        return self.num_neurons // self.experts * self.top_k_experts

    @property
    def router_learns(self) -> bool:
        """Whether a gradient reaches the router."""
        return bool(self.experts) and self.is_gated

    @property
    def is_gated(self) -> bool:
        """Whether an expert's router score is a factor of its neurons' scores."""
        return (
            self.experts > 0 and self.semantics == "token_topk" and self.gate != "none"
        )

    def same_function(self, other: "SparseConfig") -> bool:
        """Whether both describe one function, wherever its rows live."""
        neutral = dict.fromkeys(_HOW_ONLY, None)
        mine, theirs = self.to_json(), other.to_json()
        return mine | neutral == theirs | neutral

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "SparseConfig":
        """The inverse of `to_json`."""
        return cls(**fields)


_HOW_ONLY = ("placement", "wire_dtype", "device_bytes", "cache", "prefetch", "update")


def _default_experts(num_neurons: int) -> int:
    return 4 * math.ceil(math.sqrt(num_neurons))


def _has_default_experts(num_neurons: int) -> bool:
    return num_neurons % _default_experts(num_neurons) == 0


def _either_side(value: int, is_legal: Any, top: int) -> str:
    below = next((n for n in range(value, 0, -1) if is_legal(n)), None)
    above = next((n for n in range(value, top + 1) if is_legal(n)), None)
    return " and ".join(str(n) for n in (below, above) if n is not None)
