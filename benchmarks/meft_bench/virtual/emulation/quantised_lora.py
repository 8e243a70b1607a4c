"""PEFT's LoRA around virtual layers with quantised weights.

For weights in 4 bits PEFT has a layer of its own, which clones the output of the
quantised layer and adds in its dtype; for those of torchao it takes its usual layer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft.tuners.lora.model
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from meft_bench.virtual.emulation.quantised_layers import Nf4Linear, QuantisedLinear

VARIANTS = (
    *("use_dora", "alora_invocation_tokens", "arrow_config", "velora_config"),
    "lora_bias",
)
"""Fields of PEFT's config of LoRA that ask for another forward."""


class LoraNf4Linear(nn.Module, LoraLayer):
    """What PEFT's LoRA layer around a weight in 4 bits does: it clones its output."""

    base_layer: nn.Module

    def __init__(self, base: nn.Module, name: str, config: Any, **options: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base)
        self.fan_in_fan_out = False
        self._active_adapter = name
        self.update_layer(
            name, options["r"], lora_alpha=options["lora_alpha"], config=config
        )

    def resolve_lora_variant(self, *, config: Any, **_: Any) -> None:
        """Return None, for LoRA without a variant; others were refused."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `... out_features` of the layer and its adapters."""
        result: Tensor = self.base_layer(x)
        result = result.clone()
        for name in self.active_adapters:
            first: Any = self.lora_A[name]
            second: Any = self.lora_B[name]
            needs_cast = not torch.is_autocast_enabled()
            expected = result.dtype
            if needs_cast:
                x = self._cast_input_dtype(x, first.weight.dtype)
            output = second(first(self.lora_dropout[name](x))) * self.scaling[name]
            if needs_cast:
                output = output.to(expected)
            result = result + output
        return result


def _refuse_variants(config: Any) -> None:
    """Refuse variants of LoRA, some of which read the weight.

    Raises:
        ValueError: the config asks for one.
    """
    wanted = [name for name in VARIANTS if getattr(config, name, None)]
    if wanted:
        raise ValueError(
            f"`{wanted[0]}` with quantised weights is not modelled: leave it out, or "
            "plan weights of the compute dtype"
        )


@contextlib.contextmanager
def known_to_peft() -> Iterator[None]:
    """Let PEFT take the layer for `Nf4Linear` that it takes for `Linear4bit`."""
    model: Any = peft.tuners.lora.model.LoraModel
    plain = model._create_new_module

    def create(config: Any, name: str, target: Any, **options: Any) -> Any:
        if isinstance(target, QuantisedLinear):
            _refuse_variants(config)
        if isinstance(target, Nf4Linear):
            return LoraNf4Linear(target, name, config, **options)
        return plain(config, name, target, **options)

    with mock.patch.object(model, "_create_new_module", staticmethod(create)):
        yield
