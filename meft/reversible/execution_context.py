"""The torch settings that select kernels, to be restored by a recompute.

A backward runs outside of the contexts that the forward ran in: autocast, the backends
selected for `scaled_dot_product_attention`, the number of threads. Another backend, or
a sum that is split among other threads, gives other bits. The precision of float32
products is not restored, because torch refuses to mix the two ways of setting it; if it
changed, the error message of the check reports it.

Autocast's weight cache stays off. If a forward without grad cached a cast, the
recompute would use that cast, which has no autograd history, and lose the gradient. A
cast shared by several chunks would sum their gradients in half precision.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.backends import cuda, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel

_IS_ENABLED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
}


class _Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object] | None = None
    """Function that sets the value; None if a recompute uses the backward's value."""
    device_type: str | None = None
    """The only type of device that the setting affects; None for all."""


def _attribute(module: Any, module_name: str, attribute: str) -> _Setting:
    return _Setting(
        f"torch.backends.{module_name}.{attribute}",
        lambda: getattr(module, attribute, None),
    )


_MKLDNN: Any = mkldnn  # torch's annotations lack `matmul`
_SETTINGS = (
    _Setting(
        "torch.get_default_dtype()", torch.get_default_dtype, torch.set_default_dtype
    ),
    _Setting(
        "torch.get_deterministic_debug_mode()",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    _Setting(
        "torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads, "cpu"
    ),
    _attribute(cuda.matmul, "cuda.matmul", "fp32_precision"),
    _attribute(cuda.matmul, "cuda.matmul", "allow_fp16_accumulation"),
    _attribute(cuda.matmul, "cuda.matmul", "allow_fp16_reduced_precision_reduction"),
    _attribute(cuda.matmul, "cuda.matmul", "allow_bf16_reduced_precision_reduction"),
    _attribute(_MKLDNN.matmul, "mkldnn.matmul", "fp32_precision"),
)


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """Autocast, attention backends and other torch settings at one point in time."""

    device_type: str
    dtype: torch.dtype
    """Dtype of autocast."""
    autocast: bool
    attention: tuple[SDPBackend, ...]
    settings: tuple[Any, ...]
    """Values of `_SETTINGS`."""

    @classmethod
    def current(cls, device: torch.device) -> "ExecutionContext":
        """Return the current settings for computations on `device`."""
        kind = device.type
        return cls(
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            _attention(),
            tuple(
                setting.read() if setting.device_type in (None, kind) else None
                for setting in _SETTINGS
            ),
        )

    @property
    def computed_in(self) -> torch.dtype | None:
        """Return the dtype that autocast computes in; None if autocast is off."""
        return self.dtype if self.autocast else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body with these settings and without autocast's weight cache."""
        with contextlib.ExitStack() as stack:
            if self.autocast or torch.is_autocast_enabled(self.device_type):
                stack.enter_context(
                    torch.autocast(
                        self.device_type, self.dtype, self.autocast, cache_enabled=False
                    )
                )
            if self.attention != _attention():
                stack.enter_context(sdpa_kernel(list(self.attention)))
            for setting, value in zip(_SETTINGS, self.settings, strict=True):
                if setting.write is None or value is None:
                    continue
                if (current := setting.read()) != value:
                    stack.callback(setting.write, current)
                    setting.write(value)
            yield

    def changed(self, now: "ExecutionContext") -> list[str]:
        """Describe each changed setting that `entered` does not restore."""
        settings = zip(_SETTINGS, self.settings, now.settings, strict=True)
        return [
            f"`{setting.name}` from {before!r} to {after!r}"
            for setting, before, after in settings
            if setting.write is None and before != after
        ]


def _attention() -> tuple[SDPBackend, ...]:
    return tuple(backend for backend, is_on in _IS_ENABLED.items() if is_on())
