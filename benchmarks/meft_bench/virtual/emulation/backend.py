"""What the two ways to train on a GPU that is not there have in common.

    cuda   fake CUDA tensors, for which parts of torch's compiled code are patched
    cpu    fake CPU tensors that are led CUDA's way, in Python alone

`VirtualGpu` takes the first, and the second where this torch cannot be patched.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One of the two."""

    name: str
    device: str
    """Type of the device on which what is the GPU's lives."""
    how: str
    """In the words of a record."""
