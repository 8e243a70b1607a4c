"""Where in a step an operator runs: its phase and its module.

Forward, backward and recompute are distinguished by querying autograd, and modules by
their hooks. An operator of the backward belongs to the module whose forward created the
node of autograd that runs; nodes are numbered in the order of their creation.
"""

import weakref
from bisect import bisect_right
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

LAST_NODE = 1 << 60
"""Lower bound of the numbers of nodes that accumulate into leaves."""


class Location:
    """The phase and the module of the present operator."""

    def __init__(self) -> None:
        self.phase = "inputs"
        """Phase outside of autograd: `inputs`, `forward` or `update`."""
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = (
            weakref.WeakKeyDictionary()
        )
        self._has_hooks = False
        self._modules: list[str] = []
        self._num_recomputing = 0
        """Number of modules that were entered inside a backward and not left."""
        self._first_nodes: list[int] = []
        self._module_of_node: list[str] = []

    def name_modules(self, model: nn.Module) -> list[Any]:
        """Follow the modules of `model`, and return the handles of new hooks."""
        handles: list[Any] = []
        if not self._has_hooks:
            self._has_hooks = True
            # Global hooks, because a model that runs some modules in parts refuses
            # hooks on these, which would never be called.
            handles = [
                register_module_forward_pre_hook(self.enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]
        self._names.update({module: name for name, module in model.named_modules()})
        return handles

    def present_phase(self) -> str:
        """Return the phase, which in a backward pass autograd determines."""
        if self.phase != "forward":
            return self.phase
        if torch._C._current_graph_task_id() == -1:
            return "forward"
        # A function of the user runs its forward without gradients, also when it is
        # recomputed inside a module.
        is_forward = torch.is_grad_enabled() or self._num_recomputing
        return "recompute" if is_forward else "backward"

    def present_module(self, phase: str) -> str:
        """Return the name of the module; empty outside of the modules of models."""
        if phase == "backward":
            node = torch._C._current_autograd_node()
            number = LAST_NODE if node is None else node._sequence_nr()
            place = bisect_right(self._first_nodes, number) - 1
            if place < 0 or number >= LAST_NODE:
                return ""
            return self._module_of_node[place]
        return self._modules[-1] if self._modules else ""

    def is_named(self, module: nn.Module) -> bool:
        """Return whether operators of the module are attributed to a name."""
        return module in self._names

    def enter(self, module: nn.Module, args: Any) -> None:
        """Attribute the operators that follow to a module; called before its forward.

        Args:
            module: the module that is called; one without a name has no effect.
            args: its arguments.
        """
        if module in self._names:
            self._modules.append(self._names[module])
            self._num_recomputing += torch._C._current_graph_task_id() != -1
            self._mark_nodes()

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if module not in self._names:
            return
        if self._modules:
            self._modules.pop()
            inside = torch._C._current_graph_task_id() != -1
            self._num_recomputing -= inside and self._num_recomputing > 0
        self._mark_nodes()

    def _mark_nodes(self) -> None:
        """Attribute nodes that are created from now on to the current module."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        name = self._modules[-1] if self._modules else ""
        if self._first_nodes and self._first_nodes[-1] >= number:
            self._module_of_node[-1] = name
        else:
            self._first_nodes.append(number)
            self._module_of_node.append(name)
