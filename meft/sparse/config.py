"""`SparseConfig`: all options of a sparse adapter."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError
from meft.sparse.adam import UPDATES
from meft.validate import (
    Expectation,
    boolean,
    check_fields,
    checked,
    integer,
    one_of,
    or_none,
    path,
    suggests_fields,
)


@suggests_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Configuration of `meft.add_sparse_adapters`.

    A sparse adapter has `num_neurons` neurons (pairs of a key and a value) next to the
    feed-forward of a block. A router sends each token to `top_k_experts` of
    `num_experts` groups of neurons, and of their neurons the token keeps the
    `top_k_neurons` with the highest scores (Hao et al., ACL 2024).

    Attributes:
        num_neurons (int): Neurons per block, r, at least 1. A neuron takes
            `2 * hidden_size` float32 numbers, and AdamW stores two more for each.
            Raise it for more capacity. Default: `6400`.
        top_k_neurons (int): Neurons that a token keeps, K, 1 to `num_neurons`. Default:
            `64`.
        num_experts (int | None): Groups of equally many neurons that the router chooses
            among, N; it must divide `num_neurons`. 0: no router, every neuron is
            scored. None: the divisor of `num_neurons` nearest to the authors' 4 *
            ceil(sqrt(num_neurons)), the larger of two that are equally near; if there
            is none from half to twice of that, as for a prime number, pass a number or
            another `num_neurons`. Default: `None`.
        top_k_experts (int): Experts that a token is routed to, 1 to the number of
            experts. Default: `8`.
        lookahead (int): Blocks before a block from whose feed-forward input its experts
            are chosen, at least 0. 0: they are chosen from its own. A larger number is
            another function: rows are known, and fetched, that many blocks earlier, for
            a choice that fits the token less. The first blocks choose from their own
            input. It needs a router. Default: `0`.
        gate (str): How an expert's router score affects the scores of its neurons.
            `logit`: it is a factor (the authors' choice). `softmax`: it is a factor
            after a softmax over all experts. `none`: it only selects the experts, and
            the router cannot learn. Default: `'logit'`.
        semantics (str): `token_topk`: the output for a token is a sum over the neurons
            that it keeps (the authors' code behind their accuracies). `union`: over all
            neurons that any token of the batch keeps, without a gate (algorithm 1 of
            the paper). Default: `'token_topk'`.
        placement (str): Where rows are stored: `offloaded`, in host memory, or
            `resident`, on the device. Use `resident` if they fit there. Default:
            `'offloaded'`.
        transfer_dtype (str | None): `float32`, `bfloat16` or `float16`: the dtype of
            rows and gradients while they are copied between host and device. Master
            rows are float32 always. None selects the backbone's dtype, and float32 for
            wider ones. `float16` loses gradients below 6e-8: scale the loss. Default:
            `None`.
        device_bytes (int): Bytes that rows, their gradients and the moments of those at
            home may take on the device, for all blocks together, at least 1: seven
            eighths for the cache, the rest for the rows of the current computation. If
            that eighth does not hold the rows that a batch chose in a block, rows are
            processed in pieces, and sums over pieces round differently. Default:
            `1073741824`.
        cache (str): How long a row stays on the device. `steps`: as long as its value
            does not change. `window`: until the next optimizer step. `home`: as
            `steps`, but what the values of all rows leave of the budget (in 16 bits, 2
            bytes a number) is for the rows that are used most, which take their
            optimizer steps on the device and are not transferred (16 bytes a number).
            Take it if each step has one batch, or if the budget holds most rows in this
            way: of others, each batch's gradient is transferred. It needs experts.
            `off`: only while it is used in a computation, so its gradient is
            transferred at once. Default: `'steps'`.
        prefetch (bool): Whether to fetch the rows that the next block used last time
            while the current block computes. Default: `True`.
        folder (str | None): Existing folder, on a local disk, of the files in which
            rows and their optimizer state are kept, mapped into memory, for rows beyond
            host memory. The files have no names and are gone when the process ends;
            forks of it can read the rows, but not change them. It is not saved with a
            model. None keeps them in host memory. Default: `None`.
        update (str): What happens to rows without a gradient in an optimizer step.
            `dense`: they take the step. `lazy`: they do not change. `catchup`: they
            take it when they are next needed, with the same bits as `dense`, at a cost
            that is proportional to the rows used. Default: `'catchup'`.

    Raises:
        ConfigError: a value has the wrong type, is out of range or contradicts another.
    """

    num_neurons: int = 6400
    top_k_neurons: int = 64
    num_experts: int | None = None
    top_k_experts: int = 8
    lookahead: int = 0
    gate: str = "logit"
    semantics: str = "token_topk"
    placement: str = "offloaded"
    transfer_dtype: str | None = None
    device_bytes: int = 2**30
    cache: str = "steps"
    prefetch: bool = True
    folder: str | None = None
    update: str = "catchup"

    def __post_init__(self) -> None:
        check_fields(self, _EXPECTED)
        if self.top_k_neurons > self.num_neurons:
            raise ConfigError(
                f"`top_k_neurons` is {self.top_k_neurons}, but there are only "
                f"{self.num_neurons} neurons (`num_neurons`)"
            )
        if self.folder is not None and self.placement != "offloaded":
            raise ConfigError(
                f"`folder` is {self.folder!r}, but `placement` is {self.placement!r}: "
                "only rows in host memory can be kept in files"
            )
        scores_all = self.num_experts == 0 and self.top_k_neurons < self.num_neurons
        if self.cache == "home" and self.placement == "offloaded" and scores_all:
            raise ConfigError(
                "`cache` is 'home', but without experts (`num_experts` is 0) the host "
                "scores all rows in each batch and needs them there: set `num_experts` "
                "(None selects a number), or take `cache='steps'`"
            )
        if self.num_experts != 0:
            self._check_experts()
        elif self.lookahead:
            raise ConfigError(
                f"`lookahead` is {self.lookahead}, but there is no router "
                "(`num_experts=0`), so that no experts are chosen earlier: set "
                "`lookahead=0`, or a number of experts"
            )

    def _check_experts(self) -> None:
        experts, neurons = self.experts, self.num_neurons
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
        """Return N, or 0 if there is no router."""
        if self.num_experts is None:
            return _default_experts(self.num_neurons)
        return self.num_experts

    @property
    def num_candidates(self) -> int:
        """Return the number of neurons that a token scores."""
        if not self.experts:
            return self.num_neurons
        return self.neurons_per_expert * self.top_k_experts

    @property
    def neurons_per_expert(self) -> int:
        """Return the number of neurons in an expert, or of all if there are none."""
        return self.num_neurons // max(self.experts, 1)

    @property
    def router_learns(self) -> bool:
        """Return whether a gradient reaches the router."""
        return bool(self.experts) and self.is_gated

    @property
    def is_gated(self) -> bool:
        """Return whether router scores are factors of the neurons' scores."""
        return (
            self.experts > 0 and self.semantics == "token_topk" and self.gate != "none"
        )

    def function(self) -> dict[str, Any]:
        """Return the fields that define the function, without those of placement.

        The default that None selects is filled in, and fields without effect have a
        single value.
        """
        of_earlier = {"lookahead": self.lookahead} if self.lookahead else {}
        return of_earlier | {
            "num_neurons": self.num_neurons,
            "top_k_neurons": self.top_k_neurons,
            "num_experts": self.experts,
            "top_k_experts": self.top_k_experts if self.experts else None,
            "gate": self.gate if self.is_gated else "none",
            "semantics": self.semantics,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object, without `folder`."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "SparseConfig":
        """Create a config from the output of `to_json`.

        Raises:
            ConfigError: a field is unknown or missing, or has an illegal value.
        """
        later = {"folder": None, "lookahead": 0}  # than the first files
        return cls(**checked({**later, **fields}, _EXPECTED))


_EXPECTED: dict[str, Expectation] = {
    "num_neurons": integer(1),
    "top_k_neurons": integer(1),
    "num_experts": or_none(integer(0)),
    "top_k_experts": integer(1),
    "lookahead": integer(0),
    "gate": one_of(("logit", "softmax", "none")),
    "semantics": one_of(("token_topk", "union")),
    "placement": one_of(("offloaded", "resident")),
    "transfer_dtype": or_none(one_of(("float32", "bfloat16", "float16"))),
    "device_bytes": integer(1),
    "cache": one_of(("steps", "window", "home", "off")),
    "prefetch": boolean,
    "folder": or_none(path),
    "update": one_of(UPDATES),
}


@functools.cache
def _default_experts(num_neurons: int) -> int:
    """Return the divisor nearest to the authors' number, the larger of two.

    If there is none from half to twice of the authors' number, return that number
    itself, which is refused later.
    """
    authors = 4 * math.ceil(math.sqrt(num_neurons))
    near = range(math.ceil(authors / 2), 2 * authors + 1)
    divisors = [number for number in near if num_neurons % number == 0]
    return min(divisors, key=lambda n: (abs(n - authors), -n), default=authors)


def _has_default_experts(num_neurons: int) -> bool:
    return num_neurons % _default_experts(num_neurons) == 0


def _either_side(value: int, is_legal: Any, top: int) -> str:
    below = next((n for n in range(value, 0, -1) if is_legal(n)), None)
    above = next((n for n in range(value, top + 1) if is_legal(n)), None)
    return " and ".join(str(n) for n in (below, above) if n is not None)
