"""A parameter of one number that stands for a block's rows in front of the world.

Rows are no parameters, so whatever walks over parameters would pass them by: gradient
clipping, loss scalers, `zero_grad()`, optimizers. The anchor lends them a place there.
After every backward its gradient is the size of the rows' gradient:

    anchor.grad = || G ||

so a global norm over parameters is right with the rows in it, and what anyone does to
the anchor's gradient is done to the rows' by proportion:

    G  <-  G * (anchor.grad now / anchor.grad as it was left)

which covers clipping, unscaling and zeroing; `None` drops G. The anchor itself stays 0.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from meft.errors import UnsupportedCallError
from meft.sparse.engine import in_backward
from meft.sparse.rows import Rows


class Anchor(nn.Module):
    """Holds the parameter; `rows` are what it stands for."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.size = AnchorParameter(torch.zeros(1))
        self.watch(self.size)
        self._left: tuple[Tensor, int, Tensor] | None = None
        """The gradient tensor as it was left, its version then, and its value."""
        self._is_settled = False
        self._version = self.size._version

    def watch(self, parameter: Any) -> None:
        """Be told after every backward of `parameter`, and known by it."""
        parameter.anchor = self
        parameter.register_post_accumulate_grad_hook(self.after_backward)

    def enter(self) -> nn.Parameter:
        """To be called in every forward: what makes the result depend on the rows."""
        if not in_backward():
            self._is_settled = False
        if self.size._version != self._version:
            self._version = self.size._version
            if self.size.detach().item() != 0:
                raise UnsupportedCallError(
                    "an optimizer that does not know the rows of sparse adapters took "
                    "a step, so they stand still: train with `meft.SparseAdamW`"
                )
        if _is_distributed():
            raise UnsupportedCallError(
                "sparse adapters train in one process: gradients of rows in host memory"
                " are not added up between processes"
            )
        return self.size

    def settle(self) -> None:
        """Before a gradient is added: do to the rows' what was done to the anchor's."""
        if self._is_settled:
            return
        self._is_settled = True
        grad = self.size.grad
        if grad is None or self._left is None:
            self.rows.drop_gradient()
        elif self._was_changed(grad):
            self.rows.scale_gradient(self.factor())

    def factor(self) -> Tensor:
        """What has been done to the gradient since the last backward; a scalar."""
        grad = self.size.grad
        assert grad is not None
        assert self._left is not None
        left = self._left[2]
        if not self._was_changed(grad):
            return torch.ones((), device=grad.device)
        return torch.where(left == 0, torch.ones_like(left), grad.detach()[0] / left)

    def mark(self) -> Tensor:
        """The gradient that autograd is to add: nothing, its hook does the rest."""
        return torch.zeros_like(self.size)

    def _was_changed(self, grad: Tensor) -> bool:
        assert self._left is not None
        return grad is not self._left[0] or grad._version != self._left[1]

    def after_backward(self, parameter: Tensor) -> None:
        """Leave the size of the rows' gradient as the anchor's."""
        self._is_settled = False
        grad = parameter.grad
        assert grad is not None
        norm = self.rows.norm()
        grad.copy_(norm.view(1))
        self._left = grad, grad._version, norm


class AnchorParameter(nn.Parameter):
    """A parameter that knows what it is the anchor of."""

    anchor: Anchor

    def __deepcopy__(self, memo: dict[int, Any]) -> "AnchorParameter":
        """torch's own copy would forget the anchor and its hook."""
        new = AnchorParameter(self.detach().clone(), self.requires_grad)
        memo[id(self)] = new
        copy.deepcopy(self.anchor, memo).watch(new)
        return new


def _is_distributed() -> bool:
    group = torch.distributed
    return (
        group.is_available() and group.is_initialized() and group.get_world_size() > 1
    )
