"""Gradients of the tensors that several parts of a stack share, summed part by part.

A rebuilding backward differentiates a stack in parts: the two halves of a branch, and
every chunk of tokens, have their own autograd graphs. A parameter's gradient is the sum
over the parts that use it. The result is the same as with a single graph:

* **The sums have autograd's order.** Autograd adds the uses of a parameter one by one.
  Where a part uses a parameter twice, adding sums of parts would round differently. If
  a sum exists already, a pull (a backward pass through the graph of one part) therefore
  starts at a `_Root`, a node whose backward passes the sums so far to the same
  parameters, so that autograd itself continues them: ((earlier + first use) + second
  use).
* **Hooks receive the whole gradient.** Autograd calls the tensor hooks of a parameter
  whenever it has computed a gradient for it, also for `torch.autograd.grad`. A pull
  computes only a part of the gradient; the stack returns the whole gradient to the
  outer backward, which then calls the hooks. The hooks are therefore wrapped, in the
  parameter's own dictionary of hooks, and do nothing during a pull.

A pull is recognised by the id of its graph task, which is recorded when its first node
runs. No state of modules or threads is changed: a backward in another thread through
the same parameter calls its hooks, and no clean-up is needed after an exception.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meft.reversible.twin import carrier_like

_pulls: set[int] = set()
"""Ids of the graph tasks that compute a part of a gradient."""


@dataclass(frozen=True, slots=True)
class Pull:
    """The data that `Gradients.pull` needs of a graph; it keeps no output alive."""

    edges: list[GradientEdge]
    """Edges at which the gradients of the outputs enter the graph; empty if no output
    requires a gradient.
    """
    dtypes: list[torch.dtype]
    """Dtypes of the outputs."""
    shared: list[Tensor]
    """Tensors whose gradients are added up."""
    is_sharded: bool = False
    """Whether other leaves collect their gradients themselves, as those of FSDP2 do."""


class Gradients:
    """The sums of gradients in one backward, by tensor."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the sum for `tensor` so far; None if there is none."""
        return self._sums.get(id(tensor))

    def prepare(
        self,
        outputs: Sequence[Tensor],
        shared: Iterable[Tensor],
        meanwhile: Iterable[Tensor] = (),
    ) -> Pull:
        """Prepare a pull through `outputs` that adds to the sums of `shared`.

        Args:
            outputs: the outputs of the graph.
            shared: the tensors whose gradients are added up.
            meanwhile: the tensors of pulls that run between this call and the pull.
        """
        distinct = list({id(t): t for t in shared}.values())
        starts = [output for output in outputs if output.requires_grad]
        summed = {*self._sums, *map(id, meanwhile)}
        if starts and not summed.isdisjoint(map(id, distinct)):
            with torch.enable_grad():
                starts = _Root.apply(self, len(starts), *starts, *distinct)  # type: ignore[no-untyped-call]
        edges = [get_gradient_edge(start) for start in starts]
        return Pull(edges, [start.dtype for start in starts], distinct)

    def prepare_sharded(self, output: Tensor, shared: list[Tensor]) -> Pull:
        """Prepare a pull through a graph whose other leaves are gathered by FSDP2.

        Args:
            output: the output of the graph.
            shared: the tensors whose gradients are added up, other than parameters.
        """
        edges = [get_gradient_edge(output)] if output.requires_grad else []
        return Pull(edges, [output.dtype], shared, is_sharded=True)

    def pull(self, pull: Pull, x: Tensor, dy: Sequence[Tensor]) -> Tensor | None:
        """Run a backward pass through a graph and add the gradients to the sums.

        Args:
            pull: the return value of `prepare` for this graph.
            x: a leaf that belongs to this graph only.
            dy: the gradient of every output that requires one.

        Returns:
            The gradient of `x`: zeros if no output depends on `x`, None if `x` does not
                require one.
        """
        inputs = [*([x] if x.requires_grad else []), *pull.shared]
        if not pull.edges or (not inputs and not pull.is_sharded):
            return torch.zeros_like(x) if x.requires_grad else None
        dy = [d.to(dtype) for d, dtype in zip(dy, pull.dtypes, strict=True)]
        if pull.is_sharded:
            return self._pull_sharded(pull, x, dy)
        task = _Task()
        if keep_hooks_for_whole_gradients(pull.shared):
            for edge in pull.edges:
                edge.node.register_prehook(task.note)
        try:
            pulled = list(
                torch.autograd.grad(pull.edges, inputs, dy, allow_unused=True)
            )
        finally:
            _pulls.discard(task.id)
        dx = pulled.pop(0) if x.requires_grad else None
        for tensor, total in zip(pull.shared, pulled, strict=True):
            if total is not None:
                self._sums[id(tensor)] = total
        if x.requires_grad and dx is None:
            return torch.zeros_like(x)
        return dx

    def _pull_sharded(
        self, pull: Pull, x: Tensor, dy: Sequence[Tensor]
    ) -> Tensor | None:
        """Run a backward in which FSDP2 reduces the gradients of its parameters.

        It does so when they have been accumulated, as reentrant checkpointing does.
        """
        torch.autograd.backward(pull.edges, dy)
        for tensor in pull.shared:
            total, tensor.grad = tensor.grad, None
            if total is not None:
                before = self._sums.get(id(tensor))
                self._sums[id(tensor)] = total if before is None else before + total
        dx, x.grad = x.grad, None
        return torch.zeros_like(x) if x.requires_grad and dx is None else dx


class _Root(torch.autograd.Function):
    """Return the outputs; in backward, also return the sums of the shared tensors."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Gradients, num_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return outputs without memory in place of the outputs of a graph.

        Args:
            ctx: the autograd context.
            gradients: the sums so far.
            num_outputs: the number of outputs among `tensors`.
            *tensors: the outputs of the graph, then the shared tensors.

        Returns:
            One tensor per output, of the same shape.
        """
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.shared = gradients, tensors[num_outputs:]
        return tuple(carrier_like(t, t.dtype) for t in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *dy, *(ctx.gradients.of(tensor) for tensor in ctx.shared)


class _Task:
    """The graph task of one pull."""

    id = -1

    def note(self, gradients: Sequence[Tensor | None]) -> None:
        """Record the task's id; this is a prehook of the nodes that run first."""
        self.id = torch._C._current_graph_task_id()
        _pulls.add(self.id)


def keep_hooks_for_whole_gradients(parameters: Iterable[Tensor]) -> bool:
    """Wrap the current hooks of parameters in place, so that they ignore partial sums.

    The wrapped hooks are also not called where there is no gradient: autograd has an
    edge from a rebuilt stack to each of its parameters, whether or not a block used it.

    Returns:
        Whether any of `parameters` has a tensor hook.
    """
    found = False
    for parameter in parameters:
        found |= _wrap(parameter._backward_hooks, _TensorHook)
        _wrap(parameter._post_accumulate_grad_hooks, _PostAccumulateGradHook)
    return found


def _wrap(
    hooks: dict[int, Callable[[Tensor], Any]] | None,
    kind: "type[_TensorHook | _PostAccumulateGradHook]",
) -> bool:
    """Wrap the values and keep the keys, by which handles remove hooks."""
    if not hooks:
        return False
    for key, hook in list(hooks.items()):
        if not isinstance(hook, kind):
            hooks[key] = kind(hook)
    return True


@dataclass(frozen=True, slots=True)
class _TensorHook:
    hook: Callable[[Tensor], Any]

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or torch._C._current_graph_task_id() in _pulls:
            return None
        changed: Tensor | None = self.hook(gradient)
        return changed


@dataclass(frozen=True, slots=True)
class _PostAccumulateGradHook:
    hook: Callable[[Tensor], Any]

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.hook(parameter)
