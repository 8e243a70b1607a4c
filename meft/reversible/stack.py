"""A stack of couplings whose backward rebuilds activations instead of storing them.

Kept between forward and backward: the top pair of streams, a seed, and nothing per
block. The backward walks down. At each block, with dy1 and dy2 the gradients of its
output pair:

    recompute g(y1), pull dy2 through it:  dG, v1;    x2 = (y2 - g(y1)) / scale_2
    recompute f(x2), pull dy1 + v1:        dF, v2;    x1 = (y1 - f(x2)) / scale_1
    dx1 = scale_1 (dy1 + v1),              dx2 = scale_2 dy2 + v2

(Liao et al., NeurIPS 2023, section 3.1.) Trainable parameters are inputs of the
autograd function and their gradients are returned, so hooks, accumulation, gradient
scaling and `torch.autograd.grad` work as for any other operation, and nothing frozen
has to pretend to be trainable. Only one branch's graph is alive at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from meft.errors import UnsupportedCallError
from meft.reversible.probe import Probe
from meft.reversible.twin import Stack, run
from meft.shapes import Hidden


def run_rebuilt(
    stack: Stack, x1: Hidden, x2: Hidden, probe: Probe | None = None
) -> tuple[Hidden, Hidden]:
    """`twin.run(stack, x1, x2)`, rebuilding activations in the backward."""
    parameters = _trainable(stack)
    call = _Call(stack, parameters, _Autocast.current(x1.device), probe)
    y1, y2 = _Rebuild.apply(call, x1, x2, *parameters)  # type: ignore[no-untyped-call]
    return y1, y2


class _Rebuild(torch.autograd.Function):
    """The autograd function; its idea is in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, call: "_Call", x1: Tensor, x2: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.versions = [p._version for p in parameters]
        with call.autocast.entered():
            y1, y2 = run(call.stack, x1, x2, call.probe)
        ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy1: Tensor | None, dy2: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        call.refuse_changed_parameters(ctx.versions)
        y1, y2 = ctx.saved_tensors
        if dy1 is None and dy2 is None:
            return (None, None, None, *[None] * len(call.parameters))
        dy1 = torch.zeros_like(y1) if dy1 is None else dy1
        dy2 = torch.zeros_like(y2) if dy2 is None else dy2
        gradients = _Gradients(call.parameters)
        wants_input = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        with call.autocast.entered():
            for index in reversed(range(len(call.stack.branches))):
                assert dy1 is not None, "only the lowest block may end without"
                assert dy2 is not None
                if call.stack.swap:
                    y1, y2, dy1, dy2 = y2, y1, dy2, dy1
                y1, y2, dy1, dy2 = _step_down(
                    call, index, (y1, y2, dy1, dy2), wants_input or index > 0, gradients
                )
        if call.probe is not None:
            call.probe.finish()
        return (None, dy1, dy2, *gradients.in_order())


def _step_down(
    call: "_Call",
    index: int,
    above: tuple[Tensor, Tensor, Tensor, Tensor],
    wants_input: bool,
    gradients: "_Gradients",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One block down: output pair and its gradients in, input pair and its out.

    Without `wants_input` nothing below the block trains: the gradients of its input
    pair are None.
    """
    stack = call.stack
    y1, y2, dy1, dy2 = above

    value, v1 = _pull(stack, index, 1, y1, dy2, True, gradients)
    x2 = (y2 - value) / stack.scale_2
    assert v1 is not None
    dy1 = dy1 + v1
    del value, v1, y2

    value, v2 = _pull(stack, index, 0, x2, dy1, wants_input, gradients)
    x1 = (y1 - value) / stack.scale_1
    del value, y1
    if call.probe is not None:
        call.probe.compare(index, x1, x2)
    if v2 is None:
        return x1, x2, None, None
    return x1, x2, stack.scale_1 * dy1, stack.scale_2 * dy2 + v2


def _pull(
    stack: Stack,
    index: int,
    side: int,
    x: Tensor,
    dy: Tensor,
    wants_input: bool,
    gradients: "_Gradients",
) -> tuple[Tensor, Tensor | None]:
    """Recompute F or G at `x` and pull `dy` through it.

    Returns its value and, if wanted, the gradient of `x`; adds up those of parameters.
    """
    parameters = stack.branches[index][side].trainable()
    with torch.enable_grad():
        x = x.detach().requires_grad_(wants_input)
        y = stack.replayable(index, side)(x)
    inputs = [*([x] if wants_input else []), *parameters]
    if not inputs or not y.requires_grad:
        return y.detach(), torch.zeros_like(x) if wants_input else None
    pulled = torch.autograd.grad(y, inputs, dy.to(y.dtype), allow_unused=True)
    gradients.add(parameters, pulled[len(inputs) - len(parameters) :])
    dx = pulled[0] if wants_input else None
    if wants_input and dx is None:
        dx = torch.zeros_like(x)
    return y.detach(), dx


@dataclass(frozen=True, slots=True)
class _Autocast:
    """The caller's autocast state, to be entered again by the recompute.

    Its weight cache stays off: the forward runs without grad, and a cast cached there
    would be found without history by the recompute and cut the gradient.
    """

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def current(cls, device: torch.device) -> "_Autocast":
        kind = device.type
        return cls(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )

    def entered(self) -> torch.autocast:
        return torch.autocast(
            self.device_type, self.dtype, self.enabled, cache_enabled=False
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """What the backward needs to know of its forward, besides the saved streams."""

    stack: Stack
    parameters: list[nn.Parameter]
    autocast: _Autocast
    probe: Probe | None

    def refuse_changed_parameters(self, versions: list[int]) -> None:
        """The recompute would silently use weights that the forward did not."""
        now = [(id(p), p._version) for p in _trainable(self.stack)]
        if now != list(zip(map(id, self.parameters), versions, strict=True)):
            raise UnsupportedCallError(
                "a trainable parameter of a reversible block was changed or replaced "
                "between forward and backward (an optimizer step, an in-place update, "
                "a changed `requires_grad`, `functional_call`): its activations can no "
                "longer be rebuilt. Run the backward first"
            )


class _Gradients:
    """Gradients of parameters, added up where several branches share one."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}

    def add(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
    ) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                earlier = self._sums.get(id(parameter))
                total = gradient if earlier is None else earlier + gradient
                self._sums[id(parameter)] = total

    def in_order(self) -> list[Tensor | None]:
        return [self._sums.get(id(parameter)) for parameter in self._parameters]


def _trainable(stack: Stack) -> list[nn.Parameter]:
    """The parameters of all branches that want a gradient, each once."""
    every = (p for pair in stack.branches for side in pair for p in side.trainable())
    return list({id(p): p for p in every}.values())
