"""`SparseAdapter`: a second feed-forward of many neurons, few of which are active.

    out = sum over some neurons i of relu(s_i) v_i,        s_i a score of k_i . h

It runs next to the block's own feed-forward, on the same input h, without a scale and
without biases (Hao et al., ACL 2024, sections 2 and 3). `token_topk` and `union` define
which neurons are summed. Padding tokens choose no neurons and get 0.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from meft import extra_state
from meft.backbone.proof import Proven
from meft.errors import UnsupportedCallError
from meft.sparse import choice, router
from meft.sparse.block_neurons import ActivityCounts, BlockNeurons
from meft.sparse.choice import Begun, EarlyChoice
from meft.sparse.config import SparseConfig
from meft.sparse.divided_rows import DividedRows
from meft.sparse.row_parameter import begin_forward, row_parameter
from meft.sparse.row_shares import own_rows
from meft.sparse.rows import Rows, Tokens
from meft.sparse.token_topk import token_topk
from meft.sparse.union import union
from meft.transforms import refuse_func, refuse_recording

Features = Float[Tensor, "*shape hidden"]
FUNCTIONS: dict[str, Callable[..., Tokens]] = {"token_topk": token_topk, "union": union}


class Padding(NamedTuple):
    """Which tokens of a batch are no padding."""

    keep: Int[Tensor, " kept"]
    """Their places among the tokens of all sequences, ascending."""
    num_tokens: int
    """Number of all tokens."""

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch seq"]) -> "Padding | None":
        """Return it for a mask that is False for padding; None without any."""
        keep = mask.flatten().nonzero()[:, 0]
        return cls(keep, mask.numel()) if len(keep) < mask.numel() else None

    def places(self, hidden: Tensor) -> Int[Tensor, " kept"]:
        """Return `keep` on the device of a batch.

        Raises:
            UnsupportedCallError: this is of another batch.
        """
        num_tokens = hidden[..., 0].numel()
        if self.num_tokens != num_tokens:
            raise UnsupportedCallError(
                f"the mask is of {self.num_tokens} tokens and the batch of "
                f"{num_tokens}: a sparse adapter needs to know which is padding"
            )
        return self.keep.to(hidden.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the adapters of a model know of the batch that it runs."""

    padding: Padding | None = None
    """Which tokens are no padding; None if all are."""
    chosen_by: dict["SparseAdapter", "SparseAdapter"] = field(default_factory=dict)
    """The adapter at whose input the experts of another one are chosen."""
    early: dict["SparseAdapter", EarlyChoice] = field(default_factory=dict)
    """Experts that have been chosen before the turn of their adapter."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """The tensors that hold its tokens, and the mask, by the name of an argument."""

    def chosen_at(self, adapter: "SparseAdapter") -> Iterator["SparseAdapter"]:
        """Iterate over the adapters whose experts are to be chosen at this one."""
        for later, earlier in self.chosen_by.items():
            if earlier is adapter and later not in self.early:
                yield later


NO_BATCH = Batch()
"""What a block knows that runs without its model."""


@dataclass
class SharedState:
    """Data that all adapters of a model share."""

    running: dict[int, list[tuple[nn.Module, Batch]]] = field(default_factory=dict)
    """By thread, modules inside of each other, and the batch that each runs."""
    had_peft_layers: bool = False
    """Whether peft had been applied to the model before the conversion."""
    has_warned_of_frozen: bool = False
    proven: Proven = field(default_factory=dict)
    """Which blocks have been compared with their own forwards."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle; a copy compares its own blocks."""
        return {**self.__dict__, "proven": {}, "running": {}}

    @property
    def batch(self) -> Batch:
        """The batch that this thread runs."""
        running = self.running.get(threading.get_ident())
        return running[-1][1] if running else NO_BATCH

    def runs(self, module: nn.Module) -> bool:
        """Return whether this thread runs a module that knows of batches."""
        running = self.running.get(threading.get_ident(), [])
        return any(module is each for each, _ in running)

    def enter(self, module: nn.Module, batch: Batch) -> None:
        """Note that a module runs a batch in this thread."""
        self.running.setdefault(threading.get_ident(), []).append((module, batch))

    def leave(self) -> None:
        """Note that the module that this thread entered last has run its batch."""
        running = self.running.get(threading.get_ident(), [])
        del running[-1:]
        if not running:
            self.running.pop(threading.get_ident(), None)


class SparseAdapter(nn.Module):
    """The sparse adapter of one block.

    Its neurons are the parameter `neurons`. They stay in float32 and in the memory
    where `rows` has them, whatever the module is moved or cast to.

    Args:
        rows: the neurons.
        router_weight: W_g, one row per expert, `experts hidden`; None without experts.
        config: how neurons are chosen and summed.
        shared: data about the current batch, shared by all blocks of a model.
    """

    def __init__(
        self,
        rows: Rows,
        router_weight: nn.Parameter | None,
        config: SparseConfig,
        shared: SharedState,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.config = config
        self.shared = shared
        self.router = router_weight
        self.neurons = row_parameter(rows)
        self.counts = ActivityCounts()

    @property
    def block_neurons(self) -> BlockNeurons:
        """Return what the two semantics use of this adapter."""
        return BlockNeurons(rows=self.rows, config=self.config, counts=self.counts)

    @property
    def is_divided(self) -> bool:
        """Return whether other processes have some of the rows."""
        return self.rows.division is not None

    def bind(self) -> "OnBatch":
        """Return a function that runs the adapter on the current batch, also later."""
        return OnBatch(self, self.shared.batch)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseAdapter":
        """Apply `to(...)`, `half()` and the like to all tensors except the neurons."""
        neurons = self._parameters.pop("neurons")
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["neurons"] = neurons
        return self

    def get_extra_state(self) -> Tensor:
        """Return the config as a tensor (`meft.extra_state`)."""
        return extra_state.to_tensor(self.config.function())

    def set_extra_state(self, state: Tensor) -> None:
        """Raise an error if a saved model has another config.

        Raises:
            AdapterFileError: the saved model computes another function.
        """
        extra_state.refuse_other(state, self.config.function())

    def _save_to_state_dict(self, destination: Any, *rest: Any, **named: Any) -> None:
        """Save the neurons of all processes, if they are divided among some."""
        super()._save_to_state_dict(destination, *rest, **named)
        if isinstance(self.rows, DividedRows):
            prefix = named.get("prefix", rest[0] if rest else "")
            destination[prefix + "neurons"] = self.rows.whole()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Copy into the neurons, even if other tensors are assigned (`assign=True`)."""
        if prefix + extra_state.KEY in state_dict:  # before anything is copied
            self.set_extra_state(state_dict[prefix + extra_state.KEY])
        if prefix + "neurons" in state_dict:
            whole = state_dict[prefix + "neurons"]
            state_dict = {**state_dict, prefix + "neurons": own_rows(self.rows, whole)}
        copying = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(
            state_dict, prefix, copying, strict, missing_keys, *rest
        )
        extra_state.forgive_missing(prefix, missing_keys)

    @torch.compiler.disable(reason="its rows are chosen and moved by plain Python")  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden: Features,
        batch: Batch = NO_BATCH,
        begun: Begun | None = None,
    ) -> Features:
        """Return the weighted sum of the values of the chosen neurons.

        Args:
            hidden: the input of the block's feed-forward, `*shape hidden`.
            batch: what is known of the batch; by default, that it has no padding.
            begun: what `begin` returned for the same input; None to begin now.

        Returns:
            The output, of the shape and dtype of `hidden`; 0 for padding.
        """
        if begun is None:
            begun = self.begin(hidden, batch)
        function = FUNCTIONS[self.config.semantics]
        with torch.autocast(hidden.device.type, enabled=False):
            out = function(begun, self.neurons, self.block_neurons).to(hidden.dtype)
        if batch.padding is None:
            return out.view_as(hidden)
        whole = torch.zeros_like(hidden).flatten(0, -2)
        return whole.index_copy(0, batch.padding.places(hidden), out).view_as(hidden)

    @torch.compiler.disable(reason="its rows are chosen and moved by plain Python")  # type: ignore[untyped-decorator]
    def begin(self, hidden: Features, batch: Batch = NO_BATCH) -> Begun:
        """Start to find out which rows a batch needs, without waiting.

        Args:
            hidden: the input of the block's feed-forward, `*shape hidden`.
            batch: what is known of the batch; by default, that it has no padding.

        Raises:
            UnsupportedCallError: the experts are chosen at an earlier block, which has
                not run on this batch.
        """
        refuse_func("a sparse adapter")
        refuse_recording(
            "which neurons of a sparse adapter answer depends on the batch"
        )
        tokens = hidden.flatten(0, -2)
        if batch.padding is not None:
            tokens = tokens[batch.padding.places(hidden)]
        # 16-bit products are used on devices that have hardware for them.
        is_cpu = tokens.device.type == "cpu"
        compute = torch.float32 if is_cpu else self.rows.store.transfer_dtype
        self.rows.begin_batch(tokens.device)
        begin_forward(self.neurons, self.rows, is_training=self.training)
        with torch.autocast(tokens.device.type, enabled=False):
            early = self._early(batch, len(tokens))
            experts, gates = self._experts_of(tokens, early)
            begun = choice.begin(
                self.block_neurons,
                tokens.to(compute),
                gates,
                experts,
                None if early is None else early.candidates,
            )
            for later in batch.chosen_at(self):
                batch.early[later] = later.choose_early(tokens.detach())
        return begun

    def choose_early(self, tokens: Tokens) -> EarlyChoice:
        """Choose experts by tokens at an earlier block, and send them to the host."""
        assert self.router is not None
        tokens = tokens.to(self.router.device)
        logits = functional.linear(tokens.float(), self.router.detach().float())
        experts = router.top(logits, self.config.top_k_experts)
        candidates = choice.candidates_of(self.block_neurons, experts)
        self.rows.expect(candidates)
        return EarlyChoice(experts=experts, candidates=candidates)

    def _early(self, batch: Batch, num_tokens: int) -> EarlyChoice | None:
        """Return what was chosen at an earlier block; None if this one chooses."""
        is_first = bool(batch.chosen_by) and self not in batch.chosen_by
        if not self.config.lookahead or is_first:
            return None
        early = batch.early.get(self)
        if early is None or len(early.experts) != num_tokens:
            raise UnsupportedCallError(
                f"with `SparseConfig(lookahead={self.config.lookahead})`, experts are "
                "chosen at other blocks that run the same batch, and this block was "
                "called without its model: run the whole model, or add sparse adapters "
                "with `lookahead=0`"
            )
        return early

    def _experts_of(
        self, tokens: Tokens, early: EarlyChoice | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the experts of each token and their gates; None where there are none.

        Args:
            tokens: h, `tokens hidden`.
            early: the experts, if they were chosen at an earlier block.
        """
        if self.router is None:
            return None, None
        if early is not None and not self.config.is_gated:
            return early.experts, None
        logits = functional.linear(tokens.float(), self.router.float())
        if early is None:
            experts = router.top(logits.detach(), self.config.top_k_experts)
        else:
            experts = early.experts
        if not self.config.is_gated:
            return experts, None
        return experts, router.gates(logits, experts, self.config.gate)


@dataclass(frozen=True, slots=True)
class OnBatch:
    """A sparse adapter on one batch, whose rows are fetched while others compute."""

    adapter: SparseAdapter
    batch: Batch

    def __call__(self, hidden: Features) -> Features:
        """Return the output of the adapter."""
        out: Tensor = self.adapter(hidden, batch=self.batch)
        return out

    def begin(self, hidden: Features) -> Callable[[], Features]:
        """Start to find out which rows are needed; the result computes the output."""
        adapter = self.adapter
        if adapter._forward_pre_hooks or adapter._backward_hooks:
            # These see and change what a call is given.
            return functools.partial(self, hidden)
        begun = self.adapter.begin(hidden, self.batch)
        return lambda: self.adapter(hidden, batch=self.batch, begun=begun)


def sparse_adapters(model: nn.Module) -> dict[str, SparseAdapter]:
    """Return the sparse adapters in `model` by name; the result may be empty."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, SparseAdapter)}
