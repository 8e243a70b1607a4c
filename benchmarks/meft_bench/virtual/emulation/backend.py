"""The common part of the two backends that emulate a GPU.

    cuda   fake CUDA tensors, for which parts of torch's compiled code are patched
    cpu    fake CPU tensors that are made to take the code paths of CUDA, in Python only

`VirtualGpu` uses the first, and the second where this build of torch cannot be patched.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Description of one backend."""

    name: str
    device: str
    """Type of the device on which the tensors of the virtual GPU are."""
    how: str
    """Description that is written to records."""
