"""The training protocol of every method (Liao et al., NeurIPS 2023, and their code).

AdamW with weight decay, but none on biases and norms; gradient clipping; a learning
rate that increases over the first steps and decreases linearly to 0. The numbers are
constants of `protocol`. Parameters are float32; `bf16` and `fp16` compute under
autocast, `fp16` with a loss scale. Where `weights_dtype` sets the backbone itself to
the compute dtype, there is no autocast. With `eval_every`, the weights with the best
score on rows that are set aside for this selection are kept. A cell may name another
optimizer, and a method may have one of its own (`optimizers`).
"""

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from meft_bench.child.backbones.unwrapped import base_of, num_prepended
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.tasks.batches import IGNORED, Batch, Example, Image, collate
from meft_bench.child.training import optimizers
from meft_bench.child.training.checkpoint import Checkpoint, TrainingState
from meft_bench.child.training.ranks import ALONE, Ranks, only_in_last
from meft_bench.shared import protocol
from meft_bench.shared.cell import Cell

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random generators, on all devices."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002  # libraries below use the global one
    torch.manual_seed(seed)


def learning_rate_at(step: int, cell: Cell) -> float:
    """Return the learning rate of a step: it rises, then falls linearly to 0.

    Args:
        step: number of the optimizer step, counted from 0.
        cell: has the peak rate and the number of steps.
    """
    num_rising = round(protocol.WARMUP_FRACTION * cell.max_steps)
    if step < num_rising:
        return cell.learning_rate * step / num_rising
    return cell.learning_rate * (cell.max_steps - step) / (cell.max_steps - num_rising)


class Stepper:
    """Model, optimizer and loss scale: all state of a training step.

    Args:
        model: the model, on its device.
        cell: the cell.
        ranks: this process among those that train the model.
        replica: what averages gradients over ranks, in the place of the model; None for
            the model itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cell: Cell,
        ranks: Ranks = ALONE,
        replica: DistributedDataParallel | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.replica = replica
        self.device = cell.device
        is_narrow = cell.unquantised_dtype == cell.dtype
        self._autocast_dtype = None if is_narrow else AUTOCAST_DTYPES.get(cell.dtype)
        self.scaler = torch.amp.GradScaler(cell.device, enabled=cell.dtype == "fp16")
        # LLaMA and OPT have no segments, and would pass them on to modules without
        # effect.
        self._accepted = set(inspect.signature(base_of(model).forward).parameters)
        self._left_out = {"token_type_ids"} - self._accepted
        trained = [p for p in model.parameters() if p.requires_grad]
        _refuse_fp16(trained, cell)
        matrices = [p for p in trained if _is_matrix(p)]
        vectors = [p for p in trained if not _is_matrix(p)]
        groups = [
            {"params": matrices, "weight_decay": protocol.WEIGHT_DECAY},
            {"params": vectors, "weight_decay": protocol.WEIGHT_DECAY_OF_VECTORS},
        ]
        self.trained = trained
        """Parameters that train, some of them perhaps not in every step."""
        self.optimizer = optimizers.make(model, groups, cell)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which a forward runs."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self._autocast_dtype)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of `batch`, which is on the device.

        `DistributedDataParallel` does not average its gradients over ranks.
        """
        with self._gradients(), self.autocast():
            loss: Tensor = self.model(**batch).loss
        return loss

    def _averaged_loss(self, batch: Batch) -> Tensor:
        # Its gradients are averaged over ranks.
        if self.replica is None:
            return self.loss(batch)
        with self.autocast():
            loss: Tensor = self.replica(**batch).loss
        return loss

    def _gradients(self) -> contextlib.AbstractContextManager[object]:
        if getattr(self.optimizer, "needs_gradients", True):
            return contextlib.nullcontext()
        return torch.no_grad()

    def step(self, batches: Sequence[Batch], learning_rate: float) -> float:
        """Take one optimizer step on the gradient of the mean loss of all `batches`.

        Gradients are released at the end, so that none exist between two steps.

        Args:
            batches: Micro-batches of one size, on the host or on the device, each with
                the rows of all ranks. See `divisors` for the weight of each.
            learning_rate: The learning rate of this step.

        Returns:
            The mean loss over all target tokens of a language model, over all rows of a
            classifier; not-a-number where no micro-batch has a target token.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # which compiled steps read
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if not getattr(self.optimizer, "needs_gradients", True):
            return float(self.optimizer.step(lambda: self._mean_loss(batches)))
        losses = []
        divisors = self.divisors(batches)
        for index, (batch, divisor) in enumerate(zip(batches, divisors, strict=True)):
            mine = self.to_device(self.ranks.share(batch))
            with only_in_last(self.replica, index + 1 == len(batches)):
                loss = self._averaged_loss(mine) / divisor
                del mine
                self._backward(loss, learning_rate)
            losses.append(loss.detach())
            del loss
        if not hasattr(self.optimizer, "fused_backward"):
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained, protocol.MAX_GRADIENT_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.ranks.mean(_sum(losses, divisors))

    def _backward(self, loss: Tensor, learning_rate: float) -> None:
        # Of an optimizer that updates in it; LOMO's learning rate is its argument.
        fused = getattr(self.optimizer, "fused_backward", None)
        if fused is None:
            self.scaler.scale(loss).backward()
        else:
            fused(loss, learning_rate)

    def _mean_loss(self, batches: Sequence[Batch]) -> float:
        divisors = self.divisors(batches)
        losses = [
            self.loss(self.to_device(batch)) / divisor
            for batch, divisor in zip(batches, divisors, strict=True)
        ]
        return _sum(losses, divisors)

    def divisors(self, batches: Sequence[Batch]) -> list[Tensor | int]:
        """Return the divisor of each micro-batch's mean loss, applied before the sum.

        A language model's loss is the mean over the target tokens of its micro-batch,
        so each is weighted by its share of the target tokens of the whole window: every
        token then has the same weight, in any micro-batch. transformers' `Trainer` does
        so with `num_items_in_batch` for models whose forward accepts it, which BART's
        does not. A micro-batch without a target token is divided by infinity, and has
        no weight. A classifier's micro-batches have equally many labels and the same
        weight. Of several ranks, each divides the loss of its part, so that the mean
        over ranks is the sum over parts.

        Args:
            batches: The micro-batches of one optimizer step, with the rows of all
                ranks.

        Returns:
            One number per micro-batch, as a tensor where it depends on the labels, so
            that a virtual GPU, whose tensors have no values, needs none.
        """
        if batches[0]["labels"].ndim == 1:
            return [len(batches)] * len(batches)
        # Models of one stack predict each token from those before it: the first label
        # of a row is no target. BART's decoder predicts all of them.
        begin = 0 if self.model.config.is_encoder_decoder else 1

        def counted(batch: Batch) -> Tensor:
            return batch["labels"][:, begin:].ne(IGNORED).sum()

        total = sum(map(counted, batches))
        size = self.ranks.size
        return [total / (size * counted(self.ranks.share(batch))) for batch in batches]

    def logits_at(self, batch: Batch, places: Tensor) -> Tensor:
        """Return the logits at some places of every row, `batch place vocabulary`.

        Args:
            batch: the inputs, on the host.
            places: places of a row, counted without tokens that a method puts before.
        """
        places = places + num_prepended(self.model)
        can_select = "logits_to_keep" in self._accepted
        inputs = batch | {"logits_to_keep": places} if can_select else batch
        with self.autocast():
            logits: Tensor = self.model(**self.to_device(inputs)).logits
        return logits if can_select else logits[:, places.to(logits.device)]

    @property
    def pad_token_id(self) -> int:
        """The token that pads the rows of a batch."""
        # Models of images have none, and no rows to pad.
        own: int = getattr(self.model.config, "pad_token_id", 0)
        return own

    def to_device(self, batch: Batch) -> Batch:
        """Return the inputs that the model accepts of `batch`, on its device."""
        return {
            name: tensor.to(self.device)
            for name, tensor in batch.items()
            if name not in self._left_out
        }


def _sum(losses: Sequence[Tensor], divisors: Sequence[Tensor | int]) -> float:
    # The mean over no target is not-a-number, even if divided by infinity.
    pairs = zip(losses, divisors, strict=True)
    return float(sum(loss for loss, divisor in pairs if not math.isinf(divisor)))


def _is_matrix(parameter: Tensor) -> bool:
    """Return whether weight decay applies; biases and norms have one dimension.

    peft gives two to vectors that multiply what a layer returns, as norms do.
    """
    return parameter.ndim > 1 and not getattr(parameter, "multiplies", False)


def _refuse_fp16(trained: Sequence[Tensor], cell: Cell) -> None:
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise ValueError(
            f"`weights_dtype` = 'fp16' with method {cell.method!r}, which trains the "
            "backbone: gradients of fp16 parameters cannot be unscaled. Take 'fp32', "
            "or a method that freezes the backbone"
        )


def train(
    stepper: Stepper,
    cell: Cell,
    batches: Iterator[Sequence[Example | Image]],
    clock: StepClock,
    validate: Callable[[], float],
    checkpoint: Checkpoint | None = None,
) -> Iterator[float]:
    """Train by the protocol and leave the selected weights in the model.

    Args:
        stepper: the model to train.
        cell: steps, rates, and when to validate and stop.
        batches: rows of each batch, without end; a step takes `cell.accumulation`.
        clock: times every step, from rows to updated weights.
        validate: returns the score of the current weights on the validation rows;
            called only with `cell.eval_every`.
        checkpoint: where the state is from time to time, and from which it is taken up;
            None for no checkpoints.

    Yields:
        The loss of each completed step, those before a checkpoint first; there may be
        fewer than `cell.max_steps`.
    """
    checkpoint = checkpoint or Checkpoint(None)
    seen = checkpoint.taken_up(stepper)
    clock.all_step_seconds[:] = seen.all_step_seconds
    first = len(seen.losses)
    for _ in range(first * cell.accumulation):
        next(batches)
    yield from list(seen.losses)
    pad_token_id = stepper.pad_token_id
    stepper.model.train()
    for step in range(first, cell.max_steps):
        if cell.patience and seen.num_worse >= cell.patience:
            break
        with clock.step():
            parts = [
                collate(next(batches), pad_token_id) for _ in range(cell.accumulation)
            ]
            loss = stepper.step(parts, learning_rate_at(step, cell))
        seen.losses.append(loss)
        yield loss
        is_last = step + 1 == cell.max_steps
        if cell.eval_every and (is_last or (step + 1) % cell.eval_every == 0):
            _look(stepper, seen, validate())
        seen.all_step_seconds = [*clock.all_step_seconds]
        checkpoint.save_if_due(stepper, seen)
    if seen.best_weights is not None:
        _restore(stepper.trained, seen.best_weights)


def _look(stepper: Stepper, seen: TrainingState, score: float) -> None:
    """Note the score of a validation, and the weights if it is the best one."""
    stepper.model.train()
    best = -math.inf if seen.best_score is None else seen.best_score
    if score > best:
        seen.best_score, seen.best_weights = score, _copied(stepper.trained)
        seen.num_worse = 0
    else:
        seen.num_worse += 1


def _largest(logits: Tensor) -> list[Any]:
    found: list[Any] = logits.argmax(-1).tolist()
    return found


@torch.no_grad()
def predict(
    stepper: Stepper,
    examples: Sequence[Example | Image],
    batch_size: int,
    read: Callable[[Tensor], list[Any]] = _largest,
) -> list[Any]:
    """Return the model's label for each example, without dropout.

    Args:
        stepper: the model.
        examples: the encoded rows.
        batch_size: number of rows of a batch.
        read: returns the answers of the logits of a batch, by default the classes with
            the largest.
    """
    stepper.model.eval()
    pad_token_id = stepper.pad_token_id
    # Batches of equal lengths need the least padding.
    order = sorted(range(len(examples)), key=lambda i: _length(examples[i]))
    labels: list[Any] = [0] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], pad_token_id)
        with stepper.autocast():
            logits = stepper.model(**stepper.to_device(batch)).logits
        for i, label in zip(chosen, read(logits), strict=True):
            labels[i] = label
    return labels


def _length(example: Example | Image) -> int:
    return len(example.token_ids) if isinstance(example, Example) else 0


def _copied(trained: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trained]


@torch.no_grad()
def _restore(trained: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(trained, weights, strict=True):
        parameter.copy_(weight)
