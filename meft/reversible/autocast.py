"""The caller's autocast state, to be entered again by a recompute.

Its weight cache stays off. A cast cached by a forward without grad would be found
without history by the recompute and cut the gradient; and one cast shared by several
chunks would add up their gradients in half precision.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Autocast:
    """Device, dtype and switch of `torch.autocast`."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def current(cls, device: torch.device) -> "Autocast":
        """The caller's."""
        kind = device.type
        return cls(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )

    def entered(self) -> torch.autocast:
        """A context with this state and without a cache."""
        return torch.autocast(
            self.device_type, self.dtype, self.enabled, cache_enabled=False
        )
