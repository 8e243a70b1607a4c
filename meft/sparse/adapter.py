"""`SparseAdapter`: a second feed-forward of many neurons, few of which are active.

    out = sum over some neurons i of relu(s_i) v_i,        s_i a score of k_i . h

It runs next to the block's own feed-forward, on the same input h, without a scale and
without biases (Hao et al., ACL 2024, sections 2 and 3). `token_topk` and `union` define
which neurons are summed. Padding tokens choose no neurons and get 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from meft import extra_state
from meft.backbone.proof import Proven
from meft.errors import UnsupportedCallError
from meft.sparse import router
from meft.sparse.block_neurons import ActivityCounts, BlockNeurons
from meft.sparse.config import SparseConfig
from meft.sparse.row_parameter import begin_forward, row_parameter
from meft.sparse.rows import Rows, Tokens
from meft.sparse.token_topk import token_topk
from meft.sparse.union import union
from meft.transforms import refuse_func, refuse_recording

Features = Float[Tensor, "*shape hidden"]
FUNCTIONS: dict[str, Callable[..., Tokens]] = {"token_topk": token_topk, "union": union}


@dataclass
class SharedState:
    """Data about the current batch that all adapters of a model share."""

    token_mask: Bool[Tensor, "batch seq"] | None = None
    """False for padding; None if there is no padding."""
    had_peft_layers: bool = False
    """Whether peft had been applied to the model before the conversion."""
    has_warned_of_frozen: bool = False
    proven: Proven = field(default_factory=dict)
    """Which blocks have been compared with their own forwards."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle; a copy compares its own blocks."""
        return {**self.__dict__, "proven": {}}


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

    def bind(self) -> Callable[[Features], Features]:
        """Return a function that runs the adapter on the current batch, also later."""
        mask = self.shared.token_mask
        return lambda hidden: self(hidden, mask)

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
        copying = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(
            state_dict, prefix, copying, strict, missing_keys, *rest
        )
        extra_state.forgive_missing(prefix, missing_keys)

    @torch.compiler.disable(reason="its rows are chosen and moved by plain Python")  # type: ignore[untyped-decorator]
    def forward(
        self, hidden: Features, token_mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Features:
        """Return the weighted sum of the values of the chosen neurons.

        Args:
            hidden: the input of the block's feed-forward, `*shape hidden`.
            token_mask: False for padding, `batch seq`; None if there is no padding.

        Returns:
            The output, of the shape and dtype of `hidden`; 0 for padding.
        """
        refuse_func("a sparse adapter")
        refuse_recording(
            "which neurons of a sparse adapter answer depends on the batch"
        )
        flat = hidden.flatten(0, -2)
        if token_mask is None:
            return self._of_tokens(flat).view_as(hidden)
        if token_mask.numel() != len(flat):
            raise UnsupportedCallError(
                f"the mask is of {token_mask.numel()} tokens and the batch of "
                f"{len(flat)}: a sparse adapter needs to know which is padding"
            )
        keep = token_mask.flatten().nonzero()[:, 0]
        out = self._of_tokens(flat[keep])
        return torch.zeros_like(flat).index_copy(0, keep, out).view_as(hidden)

    def _of_tokens(self, tokens: Tokens) -> Tokens:
        store = self.rows.store
        # 16-bit products are used on devices that have hardware for them.
        compute = torch.float32 if tokens.device.type == "cpu" else store.transfer_dtype
        self.rows.begin_batch(tokens.device)
        begin_forward(self.neurons, self.rows)
        with torch.autocast(tokens.device.type, enabled=False):
            experts, gates = self._experts_of(tokens)
            function = FUNCTIONS[self.config.semantics]
            arguments = (tokens.to(compute), gates, self.neurons, experts)
            out = function(*arguments, self.block_neurons)
        return out.to(tokens.dtype)

    def _experts_of(self, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
        """Return the experts of each token and their gates; None where there are none.

        Args:
            tokens: h, `tokens hidden`.
        """
        if self.router is None:
            return None, None
        logits = functional.linear(tokens.float(), self.router.float())
        experts = router.top(logits.detach(), self.config.top_k_experts)
        if not self.config.is_gated:
            return experts, None
        return experts, router.gates(logits, experts, self.config.gate)


def sparse_adapters(model: nn.Module) -> dict[str, SparseAdapter]:
    """Return the sparse adapters in `model` by name; the result may be empty."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, SparseAdapter)}
