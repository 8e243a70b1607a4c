"""The encoder loop of a reversible model: duplicate, run the stack, merge.

    h -> plain frozen blocks -> (h, h) -> rebuilt span -> stored blocks -> (x1 + x2) / 2

It stands where transformers' `BertEncoder` stood and keeps its parameter names
(`layer.N...`), with the adapters beside them (`adapters.N...`). It holds no state
between forward and backward, so several forwards before a backward are fine.
"""

import functools
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder, BertLayer

from meft.backbone import is_checkpointing
from meft.bottleneck import wide_dtype
from meft.errors import LostGradientWarning, UnsupportedCallError
from meft.reversible.config import ReversibleConfig
from meft.reversible.probe import Probe, warning_text
from meft.reversible.rng import draw_seed
from meft.reversible.stack import run_rebuilt
from meft.reversible.twin import Stack, run
from meft.reversible.variants import SWAPS, branches
from meft.shapes import Hidden

_FOR_DECODERS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "use_cache",
)


class ReversibleEncoder(nn.Module):
    """`BertEncoder` with two streams.

    Args:
        encoder: the original; its blocks are taken over, not copied.
        adapters: one `ModuleDict` of adapters per block from `span[0]` up.
        config: what kind of reversible model this is.
        span: blocks to rebuild, first and end.
    """

    def __init__(
        self,
        encoder: BertEncoder,
        adapters: nn.ModuleDict,
        config: ReversibleConfig,
        span: tuple[int, int],
    ) -> None:
        super().__init__()
        self.config = encoder.config
        self.layer = encoder.layer
        self.adapters = adapters
        self.reversible = config
        self.span = span
        self.backward_pass = config.backward
        self.probe: Probe | None = None
        """Set by `meft.testing` to watch one forward and backward."""
        self._first_step_is_over = False

    @property
    def blocks(self) -> list[BertLayer]:
        """All blocks, lowest first."""
        return [cast(BertLayer, block) for block in self.layer]

    def adapters_of(self, block: int) -> nn.ModuleDict:
        """The adapters of one block from `span[0]` up."""
        return cast(nn.ModuleDict, self.adapters[str(block)])

    def forward(
        self,
        hidden_states: Hidden,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As `BertEncoder.forward`, for encoders: no cache, no cross-attention."""
        kwargs = self._supported(kwargs)
        first, end = self.span
        hidden = hidden_states
        for block in self.blocks[:first]:
            hidden = block(hidden, attention_mask, **kwargs)

        x = hidden.to(wide_dtype(hidden.dtype))
        seed = draw_seed() if self.training else None
        make = functools.partial(
            self._stack, seed=seed, mask=attention_mask, kwargs=kwargs
        )
        x1, x2 = self._run_span(make(first, end), x)
        if end < len(self.layer):
            x1, x2 = run(make(end, len(self.layer)), x1, x2)
        merged = (x1 + x2) / 2
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=merged.to(hidden.dtype)
        )

    def _run_span(self, stack: Stack, x: Hidden) -> tuple[Hidden, Hidden]:
        if not torch.is_grad_enabled() or self.backward_pass == "store":
            return run(stack, x, x, self.probe)
        probe = self.probe
        if probe is None and not self._first_step_is_over:
            dtype = x.dtype

            def report(probe: Probe) -> None:
                if not self._first_step_is_over:
                    self._first_step_is_over = True
                    _warn_if_lost(stack, probe, dtype)

            probe = Probe(len(stack.branches), when_done=report)
        return run_rebuilt(stack, x, x, probe)

    def _stack(
        self,
        first: int,
        end: int,
        seed: int | None,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Stack:
        variant = self.reversible.variant
        scale_1, scale_2 = self.reversible.scales
        return Stack(
            branches=[
                branches(variant, block, self.adapters_of(i), mask, **kwargs)
                for i, block in enumerate(self.blocks[first:end], first)
            ],
            scale_1=scale_1,
            scale_2=scale_2,
            swap=SWAPS[variant],
            seed=seed,
            first_block=first,
        )

    def _supported(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Refuse what two streams cannot give; pass the rest on to the blocks."""
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise UnsupportedCallError(
                    f"`{name}=True` is not supported by a reversible encoder: between "
                    "blocks there are two streams, which are rebuilt and not kept"
                )
        for name in _FOR_DECODERS:
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise UnsupportedCallError(
                    f"`{name}` is for decoders; a reversible BERT is an encoder"
                )
        if self.training and is_checkpointing(self.layer):
            raise UnsupportedCallError(
                "gradient checkpointing is on: a reversible stack rebuilds its "
                "activations already. Call `model.activation_checkpointing_disable()`"
            )
        return kwargs


def _warn_if_lost(stack: Stack, probe: Probe, dtype: torch.dtype) -> None:
    text = warning_text(
        probe.point_errors(stack.swap),
        stack.first_block,
        stack.scale_1,
        stack.scale_2,
        dtype,
    )
    if text is not None:
        warnings.warn(text, LostGradientWarning, stacklevel=2)
