"""Tensors that enter or leave a branch other than as arguments or return values.

A rebuilt branch is differentiated when its stack's backward recomputes it. autograd
knows the arguments of the block and the parameters of its modules. Two things are
unknown to it:

* **Into the branch.** A forward hook or an attention function may use a parameter that
  belongs to another module. `leaves_of` finds such a parameter at the end of the
  branch's graph, and the stack then treats it like one of its own. A tensor that was
  computed outside, which has a graph of its own, is refused.
* **Out of the branch.** A forward hook may keep an activation, and a loss may use it.
  The forward pass stores no graph, so the gradient of such a loss would be missing.
  `Exits` runs a branch with a graph that holds no activations and raises an error if a
  backward pass reaches it, and reports whether any tensor with such a graph was kept.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from meft.errors import UnsupportedCallError

Parameters = weakref.WeakValueDictionary[int, Tensor]
"""Tensors by their id, as long as other references to them exist."""

_IDLE = ("transformers.utils.output_capturing", "meft.backbone.uncalled")
"""Modules whose hooks receive no activation: transformers registers some that do
nothing unless `output_hidden_states=True`, which a stack refuses, and ours refuse
calls.
"""
_KEPT = (
    "a backward pass has reached an activation that was computed inside a reversible "
    "block and kept by a hook or a module. A stack with `backward='rebuild'` stores no "
    "graph of it, so gradients would be missing. Set `backward='store'` in the "
    "`ReversibleConfig`, or `.detach()` the activation if the loss does not need its "
    "gradient"
)


def leaves_of(
    output: Tensor, own: Iterable[Tensor], block: int, oldest: int = 0
) -> list[Tensor]:
    """Return the leaves in the graph of `output` that are not in `own`.

    Args:
        output: what a part of a branch has returned, `batch seq hidden`.
        own: tensors whose gradients are handled already: inputs and parameters.
        block: index of the block, for the error message.
        oldest: sequence number of the first node that the branch may have created.

    Returns:
        The leaves, such as parameters of other modules.

    Raises:
        UnsupportedCallError: the branch uses a tensor that was computed outside of it.
    """
    ends = {id(t) if t.is_leaf else (t.grad_fn, t.output_nr) for t in own}
    node = output.grad_fn
    if node is None or (node, output.output_nr) in ends:
        return []
    found, seen, todo = [], {node}, [node]
    while todo:
        node = todo.pop()
        following = node.next_functions
        if not following:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in ends:
                found.append(variable)
        elif node._sequence_nr() < oldest or isinstance(node, _Entrance._backward_cls):
            raise UnsupportedCallError(
                f"block {block} uses a tensor that requires a gradient and was "
                f"computed outside of the block ({node.name()}), but is not one of its "
                "arguments, as when a hook uses what another module has computed. Its "
                "gradient would be missing: compute it where it is used, from "
                "parameters; pass it to the model as an argument that reaches the "
                "block; `.detach()` it if it needs no gradient; or set "
                "`backward='store'` in the `ReversibleConfig`"
            )
        for edge in following:
            if edge[0] is not None and edge[0] not in seen and edge not in ends:
                seen.add(edge[0])
                todo.append(edge[0])
    return found


def newest_node() -> int:
    """Return the sequence number that a new autograd node has now in this thread."""
    with torch.enable_grad():
        node = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert node is not None
    return node._sequence_nr()


class Exits:
    """Run branches with a graph that holds no activations.

    Args:
        sources: tensors to which the gradient of a kept activation would flow. A
            backward pass to one of these (`torch.autograd.grad`) also reaches the
            graph.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._sources = sources
        self._token: _Token | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Run the body with grad enabled; a backward through its graph raises."""
        token = self._token = _Token()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: token, _refuse_kept)
        # (Nodes must not keep a tensor itself: an output that its own node holds is
        # never freed.)
        with torch.enable_grad(), hooks:
            yield

    def entrance(self, x: Tensor, wants_gradient: bool) -> Tensor:
        """Return `x` as the start of such a graph."""
        if not wants_gradient:
            return x.detach()
        out: Tensor = _Entrance.apply(self._token, x.detach(), *self._sources)  # type: ignore[no-untyped-call]
        return out if out.requires_grad else out.requires_grad_()

    def used(self) -> bool:
        """Return whether a tensor with such a graph is still referenced."""
        alive = weakref.ref(self._token) if self._token is not None else lambda: None
        self._token = None
        return alive() is not None


class _Token:
    """An object that every node of one graph references."""


class _Entrance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: _Token, x: Tensor, *sources: Tensor) -> Tensor:
        """Return a view of `x` whose graph leads to `sources`.

        Args:
            ctx: the autograd context.
            token: the object that every node of the graph references.
            x: the input of a part of a branch, `batch seq hidden`.
            *sources: tensors to which a gradient could flow.

        Returns:
            A view of `x`.
        """
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        """Raise an error, because the graph holds no activations.

        Raises:
            UnsupportedCallError: always.
        """
        _refuse_kept(None)


def _refuse_kept(_: Any) -> NoReturn:
    raise UnsupportedCallError(_KEPT)


def has_forward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether hooks may read or change what these modules compute."""
    return (
        bool(torch_module._global_forward_hooks)
        or bool(torch_module._global_forward_pre_hooks)
        or any(
            hook.__module__ not in _IDLE
            for module in modules
            if module._forward_hooks or module._forward_pre_hooks
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
    )


def refuse_late(leaf: Tensor, block: int) -> NoReturn:
    """Refuse a leaf that was not used, or could not be found, in the forward.

    Args:
        leaf: the parameter.
        block: index of the block, for the error message.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        f"block {block} uses a parameter of shape {tuple(leaf.shape)} that is not its "
        "own and that it did not use when this stack last looked for such parameters: "
        "it was unfrozen, or put into use, after the first batch. This backward pass "
        "would not give its gradient. Clear all gradients (`zero_grad()`) and run "
        "forward and backward again: from now on this parameter is known; or set "
        "`backward='store'` in the `ReversibleConfig`"
    )
