"""One cell, from names to numbers, in the process made for it.

    load task and backbone -> apply the method -> train, timed -> score the weights
    -> probe memory -> check the inverse, if there is one

What has been seen is put into a `Sighting` at once, so that a cell that runs out of
memory half-way still tells what it saw. Memory is probed after training, on the model
as it is, with a learning rate of 0: the optimizer does all its work and the weights
stay. The probe's batch is the largest the cell can meet, without padding, so that the
figures do not depend on which rows came up.
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meft.testing import check_reversible
from meft_bench import backbones
from meft_bench.backbones import Backbone
from meft_bench.cell import Cell
from meft_bench.meters import memory, transfer
from meft_bench.meters.clock import StepClock
from meft_bench.out_of_memory import is_out_of_memory
from meft_bench.record import Measurement
from meft_bench.registry import METHODS, TASKS, load
from meft_bench.source import MissingError, Source
from meft_bench.tasks import synthetic
from meft_bench.tasks.batches import Batch, Example, encode, epochs, full_batch
from meft_bench.tasks.task import Row, Task
from meft_bench.training import Stepper, predict, seed_everything, train


class Sighting:
    """What has been seen of a cell so far."""

    def __init__(self) -> None:
        self.measurement = Measurement()
        self.environment: dict[str, str | int | None] = {}

    def note(self, **fields: Any) -> None:
        """Add fields of `Measurement`."""
        self.measurement = dataclasses.replace(self.measurement, **fields)


def measure(cell: Cell, source: Source, sighting: Sighting) -> None:
    """Run `cell` and note in `sighting` everything there is to see.

    Raises:
        MissingError: data, weights or the device are not at hand.
    """
    _require_device(cell)
    sighting.environment |= {
        "device_name": _device_name(cell),
        "num_threads": torch.get_num_threads(),
    }
    task: Task = load(TASKS[cell.task])(cell, source)
    sighting.environment["data_origin"] = task.origin
    seed_everything(cell.seed)
    backbone = backbones.load(cell, task.num_labels, source)
    sighting.environment |= {
        "weights_origin": backbone.origin,
        "weights_sha256": backbone.sha256,
    }
    examples = _examples(task, backbone, cell)
    if cell.eval_every and not examples.validation:
        raise ValueError(
            f"`eval_every` is {cell.eval_every}, but task {cell.task!r} leaves no rows "
            "to select weights with: set it to 0, or `train_rows` to at least 10"
        )
    stepper = _prepare(backbone, cell, sighting)
    sighting.note(num_train_rows=len(examples.train))
    _train_and_score(stepper, cell, task, examples, sighting)
    batch = full_batch(examples.train, cell)
    _probe_memory(stepper, cell, batch, sighting)
    if cell.method.startswith("meft") and not cell.method.endswith("-store"):
        _check_inverse(stepper, batch, sighting)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Examples:
    train: list[Example]
    validation: list[Example]
    evaluation: list[Example]


def _require_device(cell: Cell) -> None:
    if cell.device == "cuda" and not torch.cuda.is_available():
        raise MissingError("no CUDA device: torch.cuda.is_available() is false")


def _device_name(cell: Cell) -> str:
    return torch.cuda.get_device_name() if cell.device == "cuda" else "cpu"


def _examples(task: Task, backbone: Backbone, cell: Cell) -> _Examples:
    if task.metric is None:
        batch = synthetic.examples(cell, backbone.model.config.vocab_size)
        return _Examples(train=batch, validation=[], evaluation=[])
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"task {cell.task!r} needs a tokenizer and {cell.backbone} has none: take "
            "task `synthetic`, or a backbone with real weights"
        )

    def encoded(rows: Sequence[Row]) -> list[Example]:
        return encode(rows, tokenizer, cell.seq_len)

    return _Examples(
        train=encoded(task.train),
        validation=encoded(task.validation),
        evaluation=encoded(task.evaluation),
    )


def _prepare(backbone: Backbone, cell: Cell, sighting: Sighting) -> Stepper:
    """Apply the method and make the optimizer."""
    num_blocks = len(backbones.blocks_of(backbone.model))
    # Seeded again, so that adapters do not depend on how the backbone was loaded.
    seed_everything(cell.seed)
    model = load(METHODS[cell.method])(backbone.model, cell).to(cell.device)
    parameters = list(model.parameters())
    sighting.note(
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        num_blocks=num_blocks,
    )
    return Stepper(model, cell)


def _train_and_score(
    stepper: Stepper, cell: Cell, task: Task, examples: _Examples, sighting: Sighting
) -> None:
    def scores_of(chosen: list[Example]) -> dict[str, float]:
        labels = predict(stepper, chosen, cell.batch_size)
        return _scores(task, labels, [e.label for e in chosen])

    def validate() -> float:
        return next(iter(scores_of(examples.validation).values()))

    clock = StepClock(cell.warmup_steps, cell.device)
    batches = epochs(examples.train, cell)
    losses: list[float] = []
    try:
        for loss in train(stepper, cell, batches, clock, validate):
            losses.append(loss)
    finally:
        sighting.note(
            num_steps=len(losses),
            loss_curve=[_finite(loss) for loss in losses],
            all_step_seconds=clock.all_step_seconds,
            step_seconds=clock.step_seconds,
            step_seconds_iqr=clock.step_seconds_iqr,
        )
    if task.metric is not None:
        scores = scores_of(examples.evaluation)
        common = Counter(row.label for row in task.train).most_common(1)[0][0]
        references = [row.label for row in task.evaluation]
        majority = _scores(task, [common] * len(references), references)
        for rank, (name, score) in zip(("", "second_"), scores.items(), strict=False):
            sighting.note(
                **{
                    f"{rank}score_name": name,
                    f"{rank}score": score,
                    f"{rank}majority_score": majority[name],
                }
            )
        sighting.note(num_eval_rows=len(references))
    sighting.note(peak_host_bytes=memory.host_peak_bytes())


def _scores(
    task: Task, predictions: list[int], references: list[int]
) -> dict[str, float]:
    # Imported here: most cells have no score, and the import costs more than they do.
    from meft_bench.tasks import metrics

    assert task.metric is not None
    return metrics.scores(task.metric, predictions, references)


def _probe_memory(
    stepper: Stepper, cell: Cell, batch: Batch, sighting: Sighting
) -> None:
    def step() -> None:
        stepper.step(batch, learning_rate=0.0)

    stepper.model.train()
    for _ in range(2):  # caches of this shape fill, optimizer state comes to be
        step()
    on_device = stepper.to_device(batch)
    sighting.note(
        saved_bytes=memory.saved_by_forward(stepper.model, on_device, stepper.loss)
    )
    del on_device
    resting_bytes = memory.resting_bytes(stepper.model, stepper.optimizer)
    sighting.note(resting_bytes=resting_bytes)
    if cell.device == "cpu":
        peak_bytes = resting_bytes + memory.cpu_step_peak_bytes(step)
        sighting.note(peak_allocated_bytes=peak_bytes)
        return
    allocated, reserved = memory.cuda_step_peak_bytes(step)
    sighting.note(peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
    import pynvml

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    with transfer.open_device(pynvml, uuid) as device:
        if device is None:
            return
        sighting.note(nvml_process_bytes=transfer.process_bytes(pynvml, device))
        with transfer.LinkMeter(pynvml, device) as link:
            step()
            torch.cuda.synchronize()
        sighting.note(pcie_rx_bytes=link.rx_bytes, pcie_tx_bytes=link.tx_bytes)


def _check_inverse(stepper: Stepper, batch: Batch, sighting: Sighting) -> None:
    stepper.model.train()
    try:
        with stepper.autocast():
            report = check_reversible(stepper.model, stepper.to_device(batch))
    except Exception as error:
        # The check also runs the stored twin, which the cell itself never has to fit.
        if not is_out_of_memory(error):
            raise
        print(f"no memory left to check the inverse: {error}", file=sys.stderr)
        return
    sighting.note(
        reconstruction_error=[_finite(e) for e in report.reconstruction_error],
        gradient_error=[_finite(e) for e in report.gradient_error],
    )


def _finite(value: float) -> float | None:
    """`value`, or None: JSON has neither infinity nor not-a-number."""
    return value if math.isfinite(value) else None
