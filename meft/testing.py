"""Checks for users: whether a model is reversible, and what it keeps for backward.

check_reversible(model, batch)   reconstruction and gradient error of every block
saved_bytes(exclude)             bytes kept for backward, exact, on any device
tolerance(dtype, depth, ...)     the error that rounding alone explains
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft.errors import UnsupportedCallError
from meft.reversible.blocks import ReversibleBlocks, reversible_stacks
from meft.reversible.coupling import growth
from meft.reversible.inverse_error import LOST, InverseErrorProbe, relative_error


@dataclass(frozen=True, kw_only=True, slots=True)
class ReversibleReport:
    """Results of `check_reversible`. `str()` returns a table, lowest block first."""

    blocks: tuple[str, ...]
    """Names in the model of the rebuilt blocks, in the order of the other fields."""
    reconstruction_error: tuple[float, ...]
    """Larger relative error of the two rebuilt input streams, per block."""
    point_error: tuple[float, ...]
    """Relative error of the point at which each block is differentiated."""
    gradient_error: tuple[float, ...]
    """Relative error of all parameter gradients of a block against the twin's."""
    repeat_error: tuple[float, ...]
    """The same error between two runs of the twin. It is above 0 if a kernel sums in an
    order that differs from run to run, as backward kernels of attention on CUDA do.
    """

    @property
    def lost_blocks(self) -> tuple[str, ...]:
        """Return the blocks whose gradients have a relative error above a tenth."""
        errors = zip(self.blocks, self.gradient_error, strict=True)
        return tuple(block for block, error in errors if not error <= LOST)

    def __str__(self) -> str:
        width = max(map(len, self.blocks))
        shows_repeats = any(error != 0 for error in self.repeat_error)
        repeats = "  stored twice" if shows_repeats else ""
        rows = [f"{'block':{width}}  reconstruction error  gradient error{repeats}"]
        for block, rebuilt, gradient, repeat in zip(
            self.blocks,
            self.reconstruction_error,
            self.gradient_error,
            self.repeat_error,
            strict=True,
        ):
            lost = "  lost" if block in self.lost_blocks else ""
            repeats = f"  {repeat:12.1e}" if shows_repeats else ""
            rows.append(
                f"{block:{width}}  {rebuilt:20.1e}  {gradient:14.1e}{repeats}{lost}"
            )
        return "\n".join(rows)


def check_reversible(model: nn.Module, batch: Mapping[str, Any]) -> ReversibleReport:
    """Compare the rebuilding backward of `model` with its stored twin on one batch.

    Both run with the same dropout masks, in the model's current mode. Parameters, their
    `.grad` and the random generators are restored. With `fixed` streams every
    reconstruction error is 0, or the backward raises. Gradient errors are 0, too, where
    kernels give the same bits every time. Some backward kernels of attention on CUDA do
    not: the stored twin therefore runs twice, and gradient errors of the size of
    `repeat_error` are caused by those kernels.
    `torch.use_deterministic_algorithms(True)` makes PyTorch choose kernels that give
    the same bits.

    Args:
        model: a model that was converted by `make_reversible()`.
        batch: keyword arguments of its forward, including labels.

    Returns:
        The errors of every rebuilt block, each relative to the size of the true values.

    Raises:
        UnsupportedModelError: the model is not reversible.
        UnsupportedCallError: the model computes no loss for the batch.
    """
    stacks = reversible_stacks(model)
    probes = {name: InverseErrorProbe(num_samples=0) for name in stacks}
    groups = {
        f"{name}.{block}": [
            parameter
            for module in (stack.blocks[block], stack.adapters_of(block))
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        for name, stack in stacks.items()
        for block in range(*stack.span)
    }
    # Blocks may share parameters.
    parameters = list(dict.fromkeys(p for group in groups.values() for p in group))
    if not parameters:
        raise UnsupportedCallError(
            "nothing in the rebuilt blocks is trained, so there are no gradients to "
            "compare: set `requires_grad` of their adapters"
        )
    stored = _gradients(model, batch, parameters, stacks, "store", {})
    rebuilt = _gradients(model, batch, parameters, stacks, "rebuild", probes)
    again = _gradients(model, batch, parameters, stacks, "store", {})
    return ReversibleReport(
        blocks=tuple(groups),
        reconstruction_error=tuple(
            error for probe in probes.values() for error in probe.rebuilt_errors()
        ),
        point_error=tuple(
            error for probe in probes.values() for error in probe.point_errors()
        ),
        gradient_error=tuple(
            _error(rebuilt, stored, group) for group in groups.values()
        ),
        repeat_error=tuple(_error(again, stored, group) for group in groups.values()),
    )


def _gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    parameters: list[nn.Parameter],
    stacks: Mapping[str, ReversibleBlocks],
    backward_pass: str,
    probes: Mapping[str, InverseErrorProbe],
) -> dict[int, Tensor]:
    """Return the gradient of the batch's loss for each parameter, by its id.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        parameters: the parameters to differentiate with respect to.
        stacks: the reversible stacks of the model, by name.
        backward_pass: `store` or `rebuild`, set on every stack during the call.
        probes: the probe of each stack, by the stack's name.
    """
    before = {name: (s.backward_pass, s.probe) for name, s in stacks.items()}
    for name, stack in stacks.items():
        stack.backward_pass, stack.probe = backward_pass, probes.get(name)
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            loss = model(**batch).loss
            if loss is None:
                raise UnsupportedCallError(
                    "the batch gives no loss: add `labels` (for question answering, "
                    "`start_positions` and `end_positions`)"
                )
            gradients = torch.autograd.grad(loss, parameters)
    finally:
        for name, stack in stacks.items():
            stack.backward_pass, stack.probe = before[name]
    return {id(p): g for p, g in zip(parameters, gradients, strict=True)}


def _error(
    found: dict[int, Tensor], true: dict[int, Tensor], parameters: list[nn.Parameter]
) -> float:
    """Relative error of the gradients of some parameters; 0 where none is trained."""
    if not parameters:
        return 0.0
    return relative_error(_joined(found, parameters), _joined(true, parameters))


def _joined(gradients: dict[int, Tensor], parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([gradients[id(p)].flatten().double() for p in parameters])


class SavedBytes:
    """Count distinct storages that autograd's saved-tensor hooks hold."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        # Storages are identified by object and not by address, which fake tensors lack.
        self._excluded = {t.untyped_storage()._cdata for t in exclude}
        self._held: dict[int, tuple[int, int]] = {}
        """Number of saved tensors of each storage that is held, and its bytes."""
        self._references: list[weakref.ref[Tensor]] = []
        self.held = 0
        """Bytes that are held now."""
        self.total = 0
        """The most bytes that were held at a time."""

    def count(self, tensor: Tensor) -> Tensor:
        """Count the tensor's whole storage and save its values; this is the pack hook.

        The tensor itself is not saved: an output that its own node holds is never
        freed.
        """
        storage, saved = tensor.untyped_storage(), tensor.detach()
        key = storage._cdata
        if key in self._excluded:
            return saved
        number, size = self._held.get(key, (0, storage.nbytes()))
        self._held[key] = number + 1, size
        if number == 0:
            self.held += size
            self.total = max(self.total, self.held)
        # The storage of a tensor that is held is that of no other one.
        release = functools.partial(self._release, key)
        self._references.append(weakref.ref(saved, release))
        return saved

    def _release(self, key: int, _: object) -> None:
        """Forget a saved tensor that is freed, with its graph."""
        number, size = self._held.pop(key)
        if number > 1:
            self._held[key] = number - 1, size
        else:
            self.held -= size


@contextlib.contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[SavedBytes]:
    """Count what the forward in the body keeps for backward.

    Each storage counts once and as a whole, however many views of it are saved. What a
    branch saves that no output depends on is freed with it.

    Args:
        exclude: tensors that exist anyway, which are not counted:
            `[*model.parameters(), *model.buffers()]`, the batch.

    Yields:
        The counter; its `total` is the most bytes that were held at a time, and `held`
        those that are held now.
    """
    counter = SavedBytes(exclude)
    with torch.autograd.graph.saved_tensors_hooks(counter.count, lambda x: x):
        yield counter


def tolerance(
    dtype: torch.dtype, depth: int, scale_1: float = 1.0, scale_2: float = 1.0
) -> float:
    """Return the relative error that rounding alone explains after `depth` blocks.

    It is the error of inverting `depth` blocks. Each block adds a few roundings and
    multiplies the existing error by `growth()`; the factor 16 covers the norms and
    attention inside a block.

    Args:
        dtype: of the streams, a floating-point dtype.
        depth: number of blocks, at least 1.
        scale_1: lambda, the factor on stream 1.
        scale_2: beta, the factor on stream 2.

    Returns:
        The error as a fraction of the true value's size.
    """
    epsilon = torch.finfo(dtype).eps
    return 16 * epsilon * depth * growth(scale_1, scale_2) ** (depth - 1)
