"""Files of safetensors, loaded onto the GPU.

`safe_open` copies into memory of the GPU without torch, which ends the process where
there is none. Here each tensor is read on the host and moved.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Self

import torch

from meft_bench.virtual.emulation.early_imports import everywhere


def on_virtual_gpu() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Yield the patches of `safe_open`, in each module that has imported it."""
    if importlib.util.find_spec("safetensors") is None:
        return
    import safetensors.torch

    plain = safetensors.safe_open

    def safe_open(
        filename: Any, framework: str, device: Any = "cpu", **kwargs: Any
    ) -> Any:
        if torch.device(device).type != "cuda":
            return plain(filename, framework, device, **kwargs)
        return _Moves(plain(filename, framework, "cpu", **kwargs), device)

    yield from everywhere(plain, "safe_open", safe_open)


class _Moves:
    """An open file, or a slice of a tensor in it, whose tensors go to a device."""

    def __init__(self, opened: Any, device: Any) -> None:
        self._opened = opened
        self._device = device

    def __enter__(self) -> Self:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the device."""
        tensor: torch.Tensor = self._opened.get_tensor(name)
        return tensor.to(self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors on the device."""
        return {name: self.get_tensor(name) for name in self._opened.keys()}

    def get_slice(self, name: str) -> Self:
        """Return a tensor of which parts are read."""
        return type(self)(self._opened.get_slice(name), self._device)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._opened[index]
        return tensor.to(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)
