"""The parameters, buffers and modes that the branches of a stack may read.

They are recorded before the forward. The backward compares them with their state then,
and runs with every module in the mode that it had.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meft.reversible.coupling import Coupling, Part
from meft.reversible.outside import has_forward_hooks
from meft.reversible.twin import Stack


class TensorVersion(NamedTuple):
    """The properties that show whether a parameter or buffer has changed."""

    identity: int
    storage: int
    dtype: torch.dtype
    device: torch.device
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorVersion":
        """Return the current properties of `tensor`."""
        return cls(
            id(tensor),
            tensor.untyped_storage()._cdata,
            tensor.dtype,
            tensor.device,
            tensor._version,  # in-place updates increment it
            tensor.requires_grad,
        )

    def change(self, now: "TensorVersion") -> str:
        """Describe what happened to the tensor, as the end of a sentence."""
        if self.requires_grad != now.requires_grad:
            return f"`requires_grad` was set to {now.requires_grad}"
        if (self.dtype, self.device) != (now.dtype, now.device):
            return f"it was moved or converted to {now.dtype} on {now.device}"
        if (self.identity, self.storage) != (now.identity, now.storage):
            return "it was replaced by another tensor, or its `.data` was"
        return "it was updated in place"


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchState:
    """The parameters and buffers that branches may read, and their modules' modes."""

    tensors: dict[int, list[Tensor]]
    """Parameters and buffers of each module that a branch uses, by the module's id."""
    outside: dict[int, list[Tensor]]
    """Parameters of other modules that a branch uses, by the coupling's number."""
    seen: list[TensorVersion]
    """Identity and version of all these tensors."""
    with_hooks: set[int]
    """Ids of the modules in `tensors` that contain forward hooks."""
    training: list[tuple[nn.Module, bool]]
    """Flag `training` of every module inside."""
    attention: list[str]
    """transformers' names of the attention implementations inside."""

    @classmethod
    def of(cls, stack: Stack, outside: dict[int, list[Tensor]]) -> "BranchState":
        """Return the current state."""
        branches = (coupling.branch for coupling in stack.couplings)
        parts = (part for b in branches for part in (b.mixing, b.tokenwise) if part)
        modules = {id(m): [*m.modules()] for part in parts for m in part.modules}
        tensors = {key: _tensors_of(inside) for key, inside in modules.items()}
        every = [module for inside in modules.values() for module in inside]
        configs = (module.__dict__.get("config") for module in every)
        kinds = (getattr(config, "_attn_implementation", None) for config in configs)
        return cls(
            tensors=tensors,
            outside=outside,
            seen=[
                TensorVersion.of(t)
                for ts in (*tensors.values(), *outside.values())
                for t in ts
            ],
            with_hooks={key for key in modules if has_forward_hooks(modules[key])},
            training=[(module, module.training) for module in every],
            attention=list(dict.fromkeys(kind for kind in kinds if kind is not None)),
        )

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Run the body with every module in the mode that it had."""
        changed = [pair for pair in self.training if pair[0].training != pair[1]]
        for module, was_training in changed:
            module.training = was_training
        try:
            yield
        finally:
            for module, was_training in changed:
                module.training = not was_training

    def trainable(self) -> list[Tensor]:
        """Return the parameters that require a gradient, without duplicates."""
        every = (
            t
            for tensors in (*self.tensors.values(), *self.outside.values())
            for t in tensors
        )
        return list({id(t): t for t in every if t.requires_grad}.values())

    def trainable_in(self, part: Part | None, coupling: Coupling) -> list[Tensor]:
        """Return those that one part of the branch of `coupling` may use."""
        if part is None:
            return []
        own = [t for m in part.modules for t in self.tensors[id(m)] if t.requires_grad]
        return own + self.outside[coupling.number]

    def trainable_of(self, coupling: Coupling) -> list[Tensor]:
        """Return those that the branch of `coupling` may use."""
        branch = coupling.branch
        return [
            tensor
            for part in (branch.mixing, branch.tokenwise)
            for tensor in self.trainable_in(part, coupling)
        ]

    def has_hooks(self, coupling: Coupling) -> bool:
        """Return whether there are forward hooks inside the branch of `coupling`."""
        parts = (coupling.branch.mixing, coupling.branch.tokenwise)
        return any(id(m) in self.with_hooks for p in parts if p for m in p.modules)


def _tensors_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of these modules, without duplicates."""
    owned = (
        tensor
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
    )
    return list({id(tensor): tensor for tensor in owned if tensor is not None}.values())


def name_of(identity: int, stack: Stack) -> str:
    """Return the name of a parameter or buffer, if it still exists."""
    for coupling in stack.couplings:
        for part in (coupling.branch.mixing, coupling.branch.tokenwise):
            for module in part.modules if part else ():
                for name, tensor in (
                    *module.named_parameters(),
                    *module.named_buffers(),
                ):
                    if id(tensor) == identity:
                        return f"`{name}` of block {coupling.block}"
    return "one of them"
