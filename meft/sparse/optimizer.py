"""`SparseAdamW`: AdamW for a model whose sparse adapters keep their rows elsewhere.

Ordinary parameters take torch's AdamW. For an anchor, which stands for a block's rows,
the rows take their step where they live: gradients come over, one block after the
other, and touched rows change in place (`meft.sparse.adam`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from meft.errors import ConfigError
from meft.sparse.adam import Schedule
from meft.sparse.anchor import Anchor, AnchorParameter

ROWS = "rows"
"""Of the state dict: what belongs to rows, per anchor in the order of the groups."""


class SparseAdamW(torch.optim.AdamW):
    """AdamW over `model.parameters()`, rows included.

    Args:
        params: parameters or groups of them, as for any optimizer of torch.
        lr: step size.
        betas: decay of the mean gradient and of the mean squared gradient.
        eps: added to the root of the latter.
        weight_decay: share of lr by which weights shrink each step.

    What happens to rows that have no gradient in a step is up to `SparseConfig.update`.
    A step uses up the rows' gradient, as if `zero_grad()` followed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for _, parameter in self._anchors():
            parameter.anchor.rows.store.begin()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter and of every row that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        anchors = [
            (group, parameter, parameter.grad)
            for group, parameter in self._anchors()
            if parameter.grad is not None
        ]
        for _, parameter, _ in anchors:
            parameter.grad = None  # torch's step is not for them
        super().step()
        for _, parameter, grad in anchors:
            parameter.grad = grad
        steps = [(group, parameter.anchor) for group, parameter, _ in anchors]
        # The gradient of the next block comes over while this one takes its step.
        coming = steps[0][1].rows.gradient() if steps else None
        for index, (group, anchor) in enumerate(steps):
            get, following = coming, steps[index + 1 : index + 2]
            coming = following[0][1].rows.gradient() if following else None
            assert get is not None
            _step(anchor, group, *get())
        for _, anchor in steps:
            anchor.rows.end_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """torch's, and per anchor the rows with their moments and steps."""
        rows = [parameter.anchor.rows.store.state() for _, parameter in self._anchors()]
        return {**super().state_dict(), ROWS: rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict()`.

        Raises:
            ConfigError: the state is of another optimizer, or of other adapters.
        """
        anchors = [parameter.anchor for _, parameter in self._anchors()]
        rows = state_dict.get(ROWS)
        if rows is None or len(rows) != len(anchors):
            raise ConfigError(
                f"the state holds rows of {len(rows or ())} adapters, but this model "
                f"has {len(anchors)}: it was not saved by a `SparseAdamW` of this model"
            )
        for anchor, state in zip(anchors, rows, strict=True):
            anchor.rows.store.refuse(state)
        others = {name: value for name, value in state_dict.items() if name != ROWS}
        super().load_state_dict(others)
        for anchor, state in zip(anchors, rows, strict=True):
            anchor.rows.store.load(state)
            anchor.rows.forget()

    def _anchors(self) -> Iterator[tuple[dict[str, Any], AnchorParameter]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                # Not by its class, which a tensor without values does not keep.
                if hasattr(parameter, "anchor"):
                    yield group, parameter


def _step(anchor: Anchor, group: dict[str, Any], ids: Tensor, gradient: Tensor) -> None:
    store = anchor.rows.store
    if store.schedule is None:
        beta1, beta2 = group["betas"]
        store.schedule = Schedule(beta1=beta1, beta2=beta2, eps=group["eps"])
    store.schedule.add(float(group["lr"]), group["weight_decay"])
    store.step(ids, gradient * anchor.rows.at_home(anchor.factor()))
    anchor.rows.drop_gradient()
