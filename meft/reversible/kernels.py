"""The caller's settings that decide which kernels run, to be entered by a recompute.

A backward runs outside of the contexts that the forward ran in: autocast, and a choice
of backends for `scaled_dot_product_attention`. Another backend gives other bits.

Autocast's weight cache stays off. A cast cached by a forward without grad would be
found without history by the recompute and cut the gradient; and one cast shared by
several chunks would add up their gradients in half precision.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

_IS_ENABLED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.MATH: cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """Device, dtype and switch of `torch.autocast`; backends of attention."""

    device_type: str
    dtype: torch.dtype
    autocast: bool
    attention: tuple[SDPBackend, ...]

    @classmethod
    def current(cls, device: torch.device) -> "Kernels":
        """The caller's."""
        kind = device.type
        return cls(
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            _attention(),
        )

    @property
    def computed_in(self) -> torch.dtype | None:
        """The dtype that autocast computes in; None where it is off."""
        return self.dtype if self.autocast else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body with these settings, and without a cache of casts."""
        with contextlib.ExitStack() as stack:
            if self.autocast or torch.is_autocast_enabled(self.device_type):
                stack.enter_context(
                    torch.autocast(
                        self.device_type, self.dtype, self.autocast, cache_enabled=False
                    )
                )
            if self.attention != _attention():
                stack.enter_context(sdpa_kernel(list(self.attention)))
            yield


def _attention() -> tuple[SDPBackend, ...]:
    return tuple(backend for backend, is_on in _IS_ENABLED.items() if is_on())
