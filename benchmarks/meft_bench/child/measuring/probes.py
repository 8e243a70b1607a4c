"""Measurements on the trained model.

Every probe takes steps with a learning rate of 0: the optimizer does all its work and
the weights do not change. The batch is the largest that the cell can contain, without
padding, so that the figures do not depend on which rows were drawn.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from meft.sparse.adapter import sparse_adapters
from meft.testing import check_reversible
from meft_bench.child.measuring.partial_result import PartialResult, finite
from meft_bench.child.meters import memory, profiled, routing, rows, transfers
from meft_bench.child.meters.interleaved import time_interleaved
from meft_bench.child.tasks.batches import Batch
from meft_bench.child.training.out_of_memory import is_out_of_memory
from meft_bench.child.training.steps import Stepper
from meft_bench.shared.cell import Cell
from meft_bench.virtual.device.allocator import ROUND_BYTES
from meft_bench.virtual.recording.breakdown import breakdown
from meft_bench.virtual.recording.ledger import Ledger
from meft_bench.virtual.recording.trace import Trace


def probe_memory(
    stepper: Stepper,
    cell: Cell,
    batches: Sequence[Batch],
    partial: PartialResult,
    num_first_steps: int = 2,
) -> None:
    """Measure bytes saved for backward, of the model state, and at the peak of a step.

    Args:
        stepper: the trained model.
        cell: the cell, which includes the device.
        batches: micro-batches of one step.
        partial: the partial result to update.
        num_first_steps: number of steps before the measurement, in which caches of this
            shape are filled and optimizer state is created.
    """

    def step() -> None:
        stepper.step(batches, learning_rate=0.0)

    stepper.model.train()
    for _ in range(num_first_steps):
        step()
    if cell.parallel == "ddp":
        on_device = stepper.to_device(stepper.ranks.share(batches[0]))
        partial.note(
            saved_bytes=memory.saved_by_forward(stepper.model, on_device, stepper.loss)
        )
        del on_device
    # Else autograd keeps gathered parameters, which a forward leaves to its backward.
    model_state_bytes = memory.model_state_bytes(stepper.model, stepper.optimizer)
    if stepper.replica is not None:
        model_state_bytes += memory.bucket_bytes(stepper.replica)
    partial.note(
        model_state_bytes=model_state_bytes,
        trainable_device_bytes=memory.trainable_device_bytes(
            stepper.model, stepper.optimizer, step
        ),
    )
    if cell.device == "cpu":
        peak_bytes = model_state_bytes + memory.cpu_step_peak_bytes(step)
        partial.note(peak_allocated_bytes=peak_bytes)
        return
    peaks = memory.cuda_step_peaks(step)
    names = [field.name for field in dataclasses.fields(peaks)]
    partial.note_readings(**{name: getattr(peaks, name) for name in names})


def look_at_peak(
    stepper: Stepper, cell: Cell, batches: Sequence[Batch], partial: PartialResult
) -> None:
    """Record one more step, and note what its peak consists of.

    Args:
        stepper: the trained model.
        cell: the cell, which includes the device.
        batches: micro-batches of one step.
        partial: the partial result to update.
    """

    def step() -> None:
        stepper.step(batches, learning_rate=0.0)

    # Hooks of modules, which name memory, do not compile.
    record = _recorded if cell.blocks == "eager" else profiled.trace_of
    try:
        trace, start = record(stepper.model, stepper.optimizer, step, cell.device)
    except Exception as error:
        # The step has run before, and its numbers are kept: what is lost is the reason
        # for them, as on a GPU without room for one tensor more.
        if cell.device == "cpu":
            raise
        print(f"no breakdown of memory: {error}", file=sys.stderr)
        return
    partial.memory_breakdown = breakdown(trace, start)


def _recorded(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], object],
    device: str,
) -> tuple[Trace, int]:
    """Take a step, and return its memory with the time at which it began."""
    # A CPU has no allocator that rounds.
    round_bytes = 1 if device == "cpu" else ROUND_BYTES
    with Ledger(accelerator=device, round_bytes=round_bytes) as ledger:
        ledger.watch(model, optimizer)
        if device == "cuda":
            ledger.add_unattributed(torch.cuda.memory_allocated())
        start = ledger.mark()
        step()
    return ledger.trace(), start


def probe_rows(
    stepper: Stepper,
    batches: Sequence[Batch],
    other_steps: Iterator[Sequence[Batch]],
    partial: PartialResult,
) -> None:
    """Measure the rows that sparse adapters transfer and hold in one step.

    The step follows those of training, so caches are in their steady state. Rows at
    home on the device leave it for other probes, which read parameters, and prefer
    those that a repeated batch uses: some steps on other batches bring them back, and
    the last of these is measured.

    Args:
        stepper: the trained model.
        batches: micro-batches of one step.
        other_steps: micro-batches of other steps.
        partial: the partial result to update.
    """
    adapters = list(sparse_adapters(stepper.model).values())
    if not adapters:
        return
    if adapters[0].config.cache == "home":
        for before in itertools.islice(other_steps, NUM_STEPS_HOME):
            stepper.step(before, learning_rate=0.0)
        batches = next(other_steps)
    meter = rows.TrafficMeter(adapters)
    stepper.step(batches, learning_rate=0.0)
    partial.note(**dataclasses.asdict(meter.result()))


NUM_STEPS_HOME = 7
"""Steps that fill all slots of the home, each at least a fifth of them."""


def probe_transfers(
    stepper: Stepper, batches: Sequence[Batch], partial: PartialResult
) -> None:
    """Count the bytes of activations that one step copies to the host and back.

    Args:
        stepper: the trained model.
        batches: micro-batches of one step.
        partial: the partial result to update.
    """
    ledgers = transfers.ledgers_of(stepper.model)
    if not ledgers:
        return
    for ledger in ledgers:
        ledger.clear()
    stepper.step(batches, learning_rate=0.0)
    partial.note(
        h2d_bytes=sum(ledger.h2d_bytes for ledger in ledgers),
        d2h_bytes=sum(ledger.d2h_bytes for ledger in ledgers),
    )


def look_at_routing(stepper: Stepper, batch: Batch, partial: PartialResult) -> None:
    """Measure how the trained model uses its neurons, without dropout.

    Args:
        stepper: the trained model.
        batch: the inputs.
        partial: the partial result to update.
    """
    stepper.model.eval()
    inputs = stepper.to_device(batch)
    found = routing.look(stepper.model, lambda: stepper.loss(inputs))
    if found is not None:
        partial.note(**dataclasses.asdict(found))


def time_against_reference(
    stepper: Stepper,
    reference: Stepper,
    cell: Cell,
    batches: Sequence[Batch],
    partial: PartialResult,
) -> None:
    """Time interleaved steps of a method and of its reference method.

    Args:
        stepper: the model of the method.
        reference: the model of the reference method.
        cell: the cell, which includes the number of steps and the device.
        batches: micro-batches of one step.
        partial: the partial result to update.
    """
    for one in (stepper, reference):
        one.model.train()
    timed = time_interleaved(
        lambda: stepper.step(batches, learning_rate=0.0),
        lambda: reference.step(batches, learning_rate=0.0),
        warmup_pairs=cell.warmup_steps,
        num_pairs=cell.max_steps,
        device=cell.device,
    )
    partial.note(**dataclasses.asdict(timed))


def check_inverse(stepper: Stepper, batch: Batch, partial: PartialResult) -> None:
    """Compare the backward of the inverse with that of the stored twin.

    Args:
        stepper: the trained model.
        batch: the inputs.
        partial: the partial result to update.
    """
    stepper.model.train()
    try:
        with stepper.autocast():
            report = check_reversible(stepper.model, stepper.to_device(batch))
    except Exception as error:
        # The check also runs the stored twin, which need not fit for the cell itself.
        if not is_out_of_memory(error):
            raise
        print(f"no memory left to check the inverse: {error}", file=sys.stderr)
        return
    partial.note(
        reconstruction_error=[finite(e) for e in report.reconstruction_error],
        gradient_error=[finite(e) for e in report.gradient_error],
        repeat_error=[finite(e) for e in report.repeat_error],
    )
