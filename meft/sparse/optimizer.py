"""`SparseAdamW`: AdamW for a model with sparse adapters.

Ordinary parameters use torch's AdamW. Rows of sparse adapters are updated in the memory
where they are stored: gradients are transferred one block after the other, and rows
with a gradient change in place (`meft.sparse.adam`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from meft.errors import ConfigError, UnsupportedCallError
from meft.sparse.row_parameter import rows_of, settle
from meft.sparse.row_shares import own_state, state_of
from meft.sparse.rows import Rows
from meft.sparse.schedule import Schedule
from meft.sparse.store import RowStore

ROWS = "rows"
"""Key of the state dict: the state of each row parameter, in the order of groups."""
ADAMW_NAMES = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
)
"""Values of `TrainingArguments.optim` that are implementations of torch's AdamW."""
_PLAIN = {
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}
"""The only values of these settings of torch's AdamW that rows support."""


class SparseAdamW(torch.optim.AdamW):
    """AdamW over all parameters of a model with sparse adapters.

    `SparseConfig.update` sets what happens to rows without a gradient in a step.
    Learning rate, betas, eps and weight decay may differ by group and by step.

    Args:
        params: parameters or groups of them, as for any optimizer of torch.
        lr: learning rate, at least 0.
        betas: decay rates of the running averages of the gradient and of its square,
            each from 0 up to, not including, 1.
        eps: number added to the root of the latter, at least 0.
        weight_decay: fraction of `lr` by which weights shrink in each step.

    Raises:
        ConfigError: a group with rows sets `amsgrad` or another option of torch's AdamW
            that rows do not support, or invalid values.
    """

    steps_rows = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._name = object()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; step counts and moments of its rows are reset."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for _, rows in _with_rows(group):
            _values(group)
            rows.owner = self._name
            rows.store.begin()
            rows.invalidate()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with every parameter and every row that has a gradient.

        Raises:
            UnsupportedCallError: the rows belong to an optimizer that was created
                later.
        """
        self._refuse_rows_of_others()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping, groups = [], []
        for group in self.param_groups:
            here = [pair for pair in _with_rows(group) if pair[0].grad is not None]
            if here:
                values = _values(group)  # raises its error here if at all, in any group
                groups.append(([rows.store for _, rows in here], values))
            stepping += here
        stores = [rows.store for _, rows in self._rows()]
        for _, rows in stepping:
            _ = rows.store.moments  # raises its error here if there is no room
        for of_group, values in groups:
            count_step(stores, of_group, values)
        for parameter, _ in stepping:
            settle(parameter)
        grads = [parameter.grad for parameter, _ in stepping]
        for parameter, _ in stepping:
            parameter.grad = None  # torch's step must skip them
        try:
            _plain_step()(self)
        finally:
            for (parameter, _), grad in zip(stepping, grads, strict=True):
                parameter.grad = grad
        # The gradient of the next block is transferred while the current block takes
        # its step.
        coming = stepping[0][1].gradient() if stepping else None
        for index, (parameter, rows) in enumerate(stepping):
            get, following = coming, stepping[index + 1 : index + 2]
            coming = following[0][1].gradient() if following else None
            assert get is not None
            rows.step(*get())
            torch.autograd.graph.increment_version(parameter)
        for _, rows in stepping:
            rows.end_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and per row parameter its moments and steps."""
        stores = [rows.store for _, rows in self._rows()]
        books = list({id(store.schedule): store.schedule for store in stores}.values())
        states = [
            {**state_of(rows), "book": _index(books, rows.store.schedule)}
            for _, rows in self._rows()
        ]
        return {**super().state_dict(), ROWS: states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned. The rows themselves are in the model's.

        Load the model's state first, as `Trainer` and accelerate do: then training
        continues with the same bits. In the other order, idle rows continue from their
        current values, which rounds differently (about 1e-7).

        Raises:
            ConfigError: the state belongs to another optimizer or to other adapters.
        """
        found = list(self._rows())
        states = state_dict.get(ROWS)
        if states is None or len(states) != len(found):
            raise ConfigError(
                f"the state holds rows of {len(states or ())} adapters, but this model "
                f"has {len(found)}: it was not saved by a `SparseAdamW` of this model"
            )
        states = [
            own_state(rows, state)
            for (_, rows), state in zip(found, states, strict=True)
        ]
        for (_, rows), state in zip(found, states, strict=True):
            rows.store.refuse(state)
        others = {name: value for name, value in state_dict.items() if name != ROWS}
        super().load_state_dict(others)
        books: dict[int, Schedule | None] = {}
        for (_, rows), state in zip(found, states, strict=True):
            rows.store.load(state)
            # Rows that shared a schedule share one again.
            rows.store.schedule = books.setdefault(state["book"], rows.store.schedule)
            rows.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        """Include the name by which rows identify this optimizer."""
        return {**super().__getstate__(), "_name": self._name}

    def _rows(self) -> Iterator[tuple[nn.Parameter, Rows]]:
        for group in self.param_groups:
            yield from _with_rows(group)

    def _refuse_rows_of_others(self) -> None:
        if any(rows.owner is not self._name for _, rows in self._rows()):
            raise UnsupportedCallError(
                "the rows of this model belong to another optimizer, and nothing was "
                "changed: each `SparseAdamW` takes over the rows that it is made with, "
                "and a copied model or optimizer has none. Call `step()` of the one "
                "made last, or make optimizers of different parameters"
            )


def optimizer_cls_and_kwargs(
    # In quotes: `TrainingArguments` brings peft, which takes a sixth of a second.
    args: "transformers.TrainingArguments",
) -> tuple[type[SparseAdamW], dict[str, Any]]:
    """Return `SparseAdamW` and the options for it in a Trainer's arguments.

        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))

    The options are learning rate, betas and eps. Trainer itself sets
    `args.weight_decay`, for all but biases and norms.

    Args:
        args: the Trainer's arguments. `optim` must be the default or another
            implementation of torch's AdamW, and `optim_args` must be empty.

    Returns:
        The class and its keyword arguments.

    Raises:
        ConfigError: `args.optim` is another optimizer, or `args.optim_args` is set.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name not in ADAMW_NAMES:
        raise ConfigError(
            f"`optim` must be the default or one of {list(ADAMW_NAMES)}, got {name!r}: "
            "rows of sparse adapters are trained by AdamW only (`meft.SparseAdamW`). "
            "Leave `optim` out of the `TrainingArguments`"
        )
    if args.optim_args:
        raise ConfigError(
            f"`optim_args` must be empty, got {args.optim_args!r}: `meft.SparseAdamW` "
            "takes no further options. Set `learning_rate`, `adam_beta1`, "
            "`adam_beta2`, `adam_epsilon` and `weight_decay` of the "
            "`TrainingArguments` instead"
        )
    return SparseAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def count_step(
    stores: Sequence[RowStore], stepping: Sequence[RowStore], values: dict[str, Any]
) -> None:
    """Count one more step of the stores of one group that have a gradient.

    Stores that have taken the same steps share one schedule. A store without a gradient
    does not step, as in torch's AdamW, and a store that was moved to another group
    steps with other values. From then on each of these parts has its own schedule.

    Args:
        stores: all stores of the optimizer.
        stepping: those that step now, with the same values.
        values: the arguments of `Schedule.add`.
    """
    for schedule in {id(store.schedule): store.schedule for store in stepping}.values():
        sharing = [store for store in stores if store.schedule is schedule]
        those = [store for store in stepping if store.schedule is schedule]
        book = Schedule(idle=_is_idle(those)) if schedule is None else schedule
        if schedule is not None and len(those) < len(sharing):
            book = copy.deepcopy(schedule)
        book.add(**values)
        for store in those:
            store.schedule = book


def _plain_step() -> Callable[[torch.optim.Optimizer], object]:
    """Return torch's step without its hooks, which those of `SparseAdamW` are.

    torch puts them around the step of a class when its first instance is made.
    """
    step: Any = torch.optim.AdamW.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]


def _with_rows(group: dict[str, Any]) -> list[tuple[nn.Parameter, Rows]]:
    pairs = [(parameter, rows_of(parameter)) for parameter in group["params"]]
    return [(parameter, rows) for parameter, rows in pairs if rows is not None]


def _values(group: dict[str, Any]) -> dict[str, Any]:
    for name, only in _PLAIN.items():
        if group.get(name, only) != only:
            raise ConfigError(
                f"`{name}` is {group[name]!r} in a group with rows of sparse adapters, "
                f"which support {only!r} only: put other parameters into a group of "
                "their own"
            )
    beta1, beta2 = (float(beta) for beta in group["betas"])
    values: dict[str, Any] = {
        "lr": float(group["lr"]),
        "betas": (beta1, beta2),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }
    Schedule(idle=_is_idle([rows.store for _, rows in _with_rows(group)])).add(**values)
    return values


def _is_idle(stores: Sequence[RowStore]) -> bool:
    """Return whether some of these stores have rows that take idle steps."""
    return any(store.update != "lazy" for store in stores)


def _index(books: list[Schedule | None], book: Schedule | None) -> int:
    return next(index for index, each in enumerate(books) if each is book)
