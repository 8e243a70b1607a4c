"""The state of a training on disk, from which a cell that was killed goes on.

A checkpoint has all that decides the steps after it: trained parameters, buffers, the
state of the optimizer and of the loss scale, random generators, and what the loop has
seen (`TrainingState`). Rows are drawn by the seed of the cell, so that their position
is the number of steps. The steps after a checkpoint are those of a training that was
never interrupted, in every bit.

It is one file of safetensors, with the rest as JSON in its header, written under
another name and then renamed. It is for the same cell, code, packages and number of
threads only (`Checkpoint.identity`); any other file, and a damaged one, is ignored.

Optimizers of torch keep all of their state where it can be read. With another one, such
as that of sparse adapters, whose rows are in host memory, there are no checkpoints, nor
where one would take more than `MOST_BYTES`.
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MOST_BYTES = 4 * 2**30
KINDS = (torch.optim.AdamW, torch.optim.SGD)
"""Optimizers whose state is complete in `state_dict`."""


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """What a training has seen so far."""

    losses: list[float] = field(default_factory=list)
    """One for each completed step."""
    all_step_seconds: list[float] = field(default_factory=list)
    best_score: float | None = None
    """Best score of the validations so far; None before the first."""
    num_worse: int = 0
    """Number of validations since the best one."""
    best_weights: list[Tensor] | None = None


class Checkpoint:
    """The file of a cell.

    Args:
        path: its path; None for no checkpoints.
        identity: what a state must agree in to be taken up.
        every_seconds: time between two checkpoints.
    """

    def __init__(
        self, path: Path | None, identity: str = "", every_seconds: float = 0.0
    ) -> None:
        self._path = path
        self._identity = identity
        self._every_seconds = every_seconds
        self._saved_at = time.monotonic()

    def save_if_due(self, stepper: Any, progress: TrainingState) -> None:
        """Write the state if the last one is old enough.

        Args:
            stepper: model, optimizer and loss scale (`training.steps.Stepper`).
            progress: what the training has seen.
        """
        if self._path is None or type(stepper.optimizer) not in KINDS:
            return
        if time.monotonic() - self._saved_at < self._every_seconds:
            return
        tensors = _tensors(stepper, progress)
        if sum(tensor.nbytes for tensor in tensors.values()) > MOST_BYTES:
            self._path = None
            return
        # Copies, as parameters may share their storage.
        copies = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
        rest = {
            "identity": self._identity,
            "progress": asdict(progress) | {"best_weights": None},
            "numbers": _numbers_of(stepper.optimizer),
            "scaler": stepper.scaler.state_dict(),
            "python": random.getstate(),
            "numpy": _numpy_state(),
        }
        unfinished = self._path.with_suffix(".part")
        try:
            save_file(copies, unfinished, {"state": json.dumps(rest)})
            unfinished.replace(self._path)
        except (OSError, SafetensorError) as error:
            # The cell itself needs no checkpoint.
            unfinished.unlink(missing_ok=True)
            print(f"no checkpoint: {error}", file=sys.stderr)
            self._path = None
        self._saved_at = time.monotonic()

    def taken_up(self, stepper: Any) -> TrainingState:
        """Return what a training had seen, with its state in `stepper`.

        Without a checkpoint of the same identity, `stepper` is as before.

        Args:
            stepper: model, optimizer and loss scale, before the first step.
        """
        if self._path is None or type(stepper.optimizer) not in KINDS:
            return TrainingState()
        try:
            with safe_open(self._path, "pt") as file:
                rest = json.loads((file.metadata() or {})["state"])
                if rest["identity"] != self._identity:
                    return TrainingState()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return TrainingState()
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            print(f"a checkpoint cannot be read, start again: {error}", file=sys.stderr)
            return TrainingState()
        progress = _restore(stepper, tensors, rest)
        number = len(progress.losses)
        print(f"went on from a checkpoint after {number} steps", file=sys.stderr)
        return progress


def _tensors(stepper: Any, progress: TrainingState) -> dict[str, Tensor]:
    """Return all tensors of a state by name."""
    found = {f"trained.{i}": tensor for i, tensor in enumerate(stepper.trained)}
    found |= {f"buffer.{name}": b for name, b in stepper.model.named_buffers()}
    for index, state in stepper.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                found[f"optimizer.{index}.{name}"] = value
    for index, tensor in enumerate(progress.best_weights or ()):
        found[f"best.{index}"] = tensor
    found["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            found[f"random.cuda.{index}"] = state
    return found


def _numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state of an optimizer that is no tensor, by parameter."""
    return {
        str(index): {n: v for n, v in state.items() if not isinstance(v, Tensor)}
        for index, state in optimizer.state_dict()["state"].items()
    }


@torch.no_grad()
def _restore(
    stepper: Any, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> TrainingState:
    for index, parameter in enumerate(stepper.trained):
        parameter.copy_(tensors[f"trained.{index}"])
    for name, buffer in stepper.model.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    state: dict[int, dict[str, Any]] = {
        int(index): dict(numbers) for index, numbers in rest["numbers"].items()
    }
    for key, tensor in tensors.items():
        part, _, place = key.partition(".")
        if part == "optimizer":
            number, _, name = place.partition(".")
            state[int(number)][name] = tensor
    groups = stepper.optimizer.state_dict()["param_groups"]
    stepper.optimizer.load_state_dict({"state": state, "param_groups": groups})
    stepper.scaler.load_state_dict(rest["scaler"])
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *others = rest["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, numpy.uint32), *others))  # noqa: NPY002
    torch.set_rng_state(tensors["random.cpu"])
    on_cuda = [key for key in tensors if key.startswith("random.cuda.")]
    for index, key in enumerate(sorted(on_cuda)):
        torch.cuda.set_rng_state(tensors[key], index)
    progress = TrainingState(**rest["progress"])
    best = [tensors[key] for key in tensors if key.startswith("best.")]
    if best:
        progress.best_weights = [
            tensors[f"best.{i}"].to(parameter.device)
            for i, parameter in enumerate(stepper.trained)
        ]
    return progress


def _numpy_state() -> list[Any]:
    kind, keys, *others = numpy.random.get_state()  # noqa: NPY002
    return [kind, numpy.asarray(keys).tolist(), *others]
