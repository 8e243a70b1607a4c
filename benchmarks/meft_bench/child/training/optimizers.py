"""The optimizers that a cell can name; each works with every method.

adamw              AdamW as torch runs it by default
adamw-fused        the same in one kernel
sgd                SGD without momentum, which has no state
adamw-8bit, -4bit  AdamW with moments of 8 or 4 bits (Dettmers et al., ICLR 2022; Li et
                   al., NeurIPS 2023), by torchao, which compiles the step
adamw-offload      AdamW whose state and step are in host memory (Ren et al., 2021), by
                   torchao; CUDA only
adamw-in-backward  AdamW that updates a parameter as soon as backward has its gradient,
                   which is then released
lomo               SGD in the same way (Lv et al., ACL 2024), by lomo_optim
adalomo            the same with a learning rate for each row and column (Lv et al.,
                   Findings of ACL 2024), by lomo_optim; CUDA only

Those that update during backward never have all gradients, so that their norm is not
clipped, and a step has one micro-batch. `adamw-offload` copies gradients to the host
during backward, before they could be clipped. A method with updates of its own has its
own optimizer (`Method.optimizer`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

import meft
from meft.sparse.adapter import sparse_adapters
from meft_bench.shared import methods, optional, protocol
from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import load
from meft_bench.shared.source import MissingError

Groups = list[dict[str, Any]]
"""Trained parameters with their weight decay, as torch's optimizers take them."""


def make(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    """Return the optimizer of a cell.

    Args:
        model: the model.
        groups: its trained parameters with their decay.
        cell: names the method and the optimizer.

    Raises:
        MissingError: the library that has it is not installed, or the device is not one
            that it supports.
    """
    method = methods.TABLE.get(cell.method)
    if method is not None and method.optimizer:
        own: torch.optim.Optimizer = load(f"{methods.FUNCTIONS}.{method.optimizer}")(
            model, groups, cell
        )
        return own
    if sparse_adapters(model):
        assert cell.optimizer == "adamw", cell.optimizer
        return meft.SparseAdamW(groups, **protocol.adam_arguments())
    return MAKERS[cell.optimizer](model, groups, cell)


def _adamw(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **protocol.adam_arguments())


def _fused(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **protocol.adam_arguments(), fused=True)


def _sgd(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups)


def _8bit(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    return _quantised("AdamW8bit", groups, cell)


def _4bit(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    return _quantised("AdamW4bit", groups, cell)


def _offload(
    model: PreTrainedModel, groups: Groups, cell: Cell
) -> torch.optim.Optimizer:
    _require_cuda(cell)
    made: Any = _of_torchao("CPUOffloadOptimizer", groups, cell)
    # Where meters of memory look for the state on the device: of small parameters.
    made.state = {} if made.d_opt is None else made.d_opt.state
    optimizer: torch.optim.Optimizer = made
    return optimizer


def _quantised(name: str, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    if any(isinstance(p, FakeTensor) for group in groups for p in group["params"]):
        raise ValueError(
            f"{_of(cell)} cannot be planned: torchao compiles the step, which needs "
            "values. Take 'adamw', or run it"
        )
    return _of_torchao(name, groups, cell)


def _of_torchao(name: str, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    library = optional.library("torchao.optim", "torchao", _of(cell))
    made: torch.optim.Optimizer = getattr(library, name)(
        groups, **protocol.adam_arguments()
    )
    return made


def _in_backward(
    model: PreTrainedModel, groups: Groups, cell: Cell
) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups, **protocol.adam_arguments())

    def update(parameter: Tensor) -> None:
        # No other parameter has a gradient, and AdamW leaves out those without.
        optimizer.step()
        parameter.grad = None

    for group in groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)
    return optimizer


def _lomo(model: PreTrainedModel, groups: Groups, cell: Cell) -> torch.optim.Optimizer:
    library = optional.library("lomo_optim", "lomo-optim", _of(cell))
    # It decays all parameters alike.
    made: torch.optim.Optimizer = library.Lomo(
        model, weight_decay=protocol.WEIGHT_DECAY
    )
    return made


def _adalomo(
    model: PreTrainedModel, groups: Groups, cell: Cell
) -> torch.optim.Optimizer:
    _require_cuda(cell)
    library = optional.library("lomo_optim", "lomo-optim", _of(cell))
    made: Any = library.AdaLomo(model, weight_decay=protocol.WEIGHT_DECAY)
    for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
        # Where meters of memory look for state.
        made.state[name] = getattr(made, name)
    found: torch.optim.Optimizer = made
    return found


def _of(cell: Cell) -> str:
    return f"`optimizer` = {cell.optimizer!r}"


def _require_cuda(cell: Cell) -> None:
    if cell.device == "cpu":
        raise MissingError(
            f"{_of(cell)} needs CUDA, and the device is 'cpu': take 'adamw', or run it "
            "where there is a GPU"
        )


MAKERS: dict[str, Callable[[PreTrainedModel, Groups, Cell], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-fused": _fused,
    "sgd": _sgd,
    "adamw-8bit": _8bit,
    "adamw-4bit": _4bit,
    "adamw-offload": _offload,
    "adamw-in-backward": _in_backward,
    "lomo": _lomo,
    "adalomo": _adalomo,
}
"""What makes each of `meft_bench.shared.registry.OPTIMIZERS`."""
