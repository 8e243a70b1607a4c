"""Measure one cell in its own process.

    load task and backbone -> apply the method -> train, timed -> score the weights
    -> probe memory -> check the inverse, if there is one
    -> time interleaved with a reference method, if the cell names one

Every measurement is added to the partial result at once, so that a cell that runs out
of memory still reports what was measured before.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import meft
from meft_bench.child import backbones
from meft_bench.child.backbones import Backbone
from meft_bench.child.measuring import (
    gpu_watch,
    guard,
    over_ranks,
    probes,
    starting_point,
)
from meft_bench.child.measuring.gpu_watch import GpuWatch
from meft_bench.child.measuring.partial_result import PartialResult, finite
from meft_bench.child.meters import memory
from meft_bench.child.meters.clock import StepClock
from meft_bench.child.scoring import answers, images, labels, numbers, recall, tokens
from meft_bench.child.scoring.examples import Examples
from meft_bench.child.tasks import synthetic
from meft_bench.child.tasks.batches import (
    Batch,
    Example,
    Image,
    epochs,
    full_batches,
    other_steps,
    refuse_padded_images,
)
from meft_bench.child.tasks.loading import load_task
from meft_bench.child.tasks.question import AnswerTask
from meft_bench.child.tasks.recall import RecallTask
from meft_bench.child.tasks.task import Task
from meft_bench.child.training import execution, prepare, ranks
from meft_bench.child.training.checkpoint import Checkpoint
from meft_bench.child.training.prepare import AnyTask
from meft_bench.child.training.steps import Stepper, train
from meft_bench.shared import configs, methods
from meft_bench.shared.cell import Cell
from meft_bench.shared.source import Source


def measure(
    cell: Cell,
    source: Source,
    partial: PartialResult,
    checkpoint: Checkpoint | None = None,
    save_to: Path | None = None,
) -> None:
    """Run `cell` and add all measurements to `partial`.

    Args:
        cell: the cell to run.
        source: where data and weights may come from.
        partial: the partial result to update.
        checkpoint: where the state of the training is from time to time.
        save_to: folder that gets the trained model; None if nothing is kept of it.

    Raises:
        MissingError: data, weights or the device are not available.
    """
    prepare.require_device(cell)
    partial.environment |= {
        "device_name": prepare.device_name(cell),
        "num_threads": torch.get_num_threads(),
    }
    ranks.join(cell)
    with execution.attention(cell), gpu_watch.watched(cell.device, partial) as watch:
        _measure(cell, source, partial, checkpoint, save_to, watch)
    over_ranks.merge(cell, partial)


def _measure(
    cell: Cell,
    source: Source,
    partial: PartialResult,
    checkpoint: Checkpoint | None,
    save_to: Path | None,
    watch: GpuWatch | None,
) -> None:
    task: AnyTask = load_task(cell, source)
    task = _with_rows_to_score(task, cell)
    partial.environment["data_origin"] = task.origin
    backbone = prepare.load_backbone(cell, task, source)
    partial.environment |= {
        "weights_origin": backbone.origin,
        "weights_sha256": backbone.sha256 or configs.digest(cell.backbone),
    }
    examples = _examples(task, backbone, cell)
    if cell.eval_every and not examples.validation:
        raise ValueError(
            f"`eval_every` is {cell.eval_every}, but task {cell.task!r} leaves no rows "
            "to select weights with: set it to 0, or `train_rows` to at least 10"
        )
    batches = full_batches(examples.train, cell)
    num_blocks = backbones.num_blocks_of(backbone.model)
    one_batch = ranks.of(cell).share(batches[0])
    before = _start(backbone.model, one_batch, cell)
    stepper = prepare.apply_method(backbone, cell)
    if before is not None:
        after = starting_point.last_hidden(stepper, one_batch)
        partial.note(start_deviation=finite(starting_point.deviation(before, after)))
        del before, after
    partial.note(
        **prepare.count(stepper.model),
        num_blocks=num_blocks,
        num_train_rows=len(examples.train),
    )
    guarded = _guarded(cell, source, backbone)
    if guarded:
        before_training = guard.perplexity(stepper, guarded, cell)
        partial.note(guard_start_perplexity=finite(before_training))
    _train_and_score(
        stepper, cell, task, backbone, examples, partial, checkpoint, watch
    )
    if guarded:
        after_training = guard.perplexity(stepper, guarded, cell)
        partial.note(guard_perplexity=finite(after_training))
    # Before a probe takes further steps. All ranks have the same weights.
    if save_to is not None:
        with meft.gathered_rows(stepper.model):
            if stepper.ranks.rank == 0:
                backbones.save(backbone, save_to)
    probes.probe_memory(stepper, cell, batches, partial)
    probes.look_at_peak(stepper, cell, batches, partial)
    if watch is not None:
        watch.probe_link(lambda: stepper.step(batches, learning_rate=0.0))
    if cell.device == "cuda":
        gpu_watch.probe_copies(
            lambda: stepper.step(batches, learning_rate=0.0), partial
        )
    probes.probe_rows(stepper, batches, other_steps(examples.train, cell), partial)
    probes.probe_transfers(stepper, batches, partial)
    probes.look_at_routing(stepper, one_batch, partial)
    if methods.of(cell.method).rebuilds and cell.parallel == "ddp":
        # The stored twin runs without sharded parameters.
        probes.check_inverse(stepper, one_batch, partial)
    if cell.reference:  # last, because it needs memory for two models
        probes.time_against_reference(
            stepper, _reference(cell, task, source), cell, batches, partial
        )


def _guarded(cell: Cell, source: Source, backbone: Backbone) -> Sequence[Example]:
    if not cell.guard_texts:
        return ()
    assert backbone.tokenizer is not None  # of a language model that reads text
    return guard.texts(cell, source, backbone.tokenizer)


def _with_rows_to_score(task: AnyTask, cell: Cell) -> AnyTask:
    """Return the task with the rows that the cell is scored on as its evaluation.

    Raises:
        ValueError: the task leaves no rows for trials.
    """
    if cell.scored_on == "evaluation":
        return task
    if not task.validation:
        raise ValueError(
            f"`scored_on` is {cell.scored_on!r}, but task {cell.task!r} sets no rows "
            "aside: set `train_rows` to at least 10, or leave it out"
        )
    changes: dict[str, Any] = {"evaluation": task.validation}
    if isinstance(task, Task):
        changes["mismatched"] = ()
    changes["origin"] = f"{task.origin}; a trial, scored on the rows set aside"
    return dataclasses.replace(task, **changes)


def _start(model: PreTrainedModel, batch: Batch, cell: Cell) -> Tensor | None:
    """Return the plain backbone's last hidden state, for methods that change it.

    Args:
        model: the backbone.
        batch: the inputs.
        cell: the cell to run.

    Returns:
        A tensor `batch seq hidden`; None for other methods.
    """
    if not methods.of(cell.method).is_reversible or cell.parallel == "fsdp2":
        return None  # of a sharded model, no device may hold the plain one
    # All parameters are frozen, so that the stepper makes no optimizer state for them.
    nn.Module.to(model.requires_grad_(False), cell.device)
    return starting_point.last_hidden(Stepper(model, cell), batch)


def _reference(cell: Cell, task: AnyTask, source: Source) -> Stepper:
    reference = dataclasses.replace(cell, method=cell.reference, reference="")
    return prepare.apply_method(
        prepare.load_backbone(reference, task, source), reference
    )


def _scoring(task: AnyTask) -> Any:
    """Return the module of `meft_bench.child.scoring` for tasks of this kind."""
    if isinstance(task, AnswerTask):
        return answers
    if isinstance(task, RecallTask):
        return recall
    if task.has_pictures:
        return images
    if task.num_labels is None:
        return tokens
    return numbers if task.num_labels == 1 else labels


def _examples(task: AnyTask, backbone: Backbone, cell: Cell) -> Examples:
    if prepare.num_labels_of(task) is None and cell.seq_len < 2:
        raise ValueError(
            f"`seq_len` is {cell.seq_len}, but a language model predicts each token "
            "from those before it: set it to 2 or more"
        )
    if task.metric is None:
        batch = _noise(backbone.model.config, cell, prepare.num_labels_of(task))
        return Examples(train=batch, validation=[], evaluation=[])
    if backbone.pixel_form is not None:
        assert isinstance(task, Task)  # a backbone of images is no language model
        refuse_padded_images(cell)
        return images.examples(task, backbone.pixel_form, cell)
    if backbone.tokenizer is None:
        raise ValueError(
            f"task {cell.task!r} needs a tokenizer and {cell.backbone} has none: take "
            "task `synthetic` or `synthetic-lm`, or a backbone with real weights"
        )
    found: Examples = _scoring(task).examples(task, backbone.tokenizer, cell)
    return found


def _noise(
    config: PreTrainedConfig, cell: Cell, num_labels: int | None
) -> Sequence[Example | Image]:
    shape = backbones.image_shape(config)
    if shape is not None:
        refuse_padded_images(cell)
        return synthetic.images(cell, shape)
    if num_labels is None:
        return synthetic.causal_lm_examples(cell, config.vocab_size)
    return synthetic.examples(cell, config.vocab_size)


def _train_and_score(
    stepper: Stepper,
    cell: Cell,
    task: AnyTask,
    backbone: Backbone,
    examples: Examples,
    partial: PartialResult,
    checkpoint: Checkpoint | None,
    watch: GpuWatch | None,
) -> None:
    scoring = _scoring(task)

    def predict(rows: Sequence[Any]) -> list[Any]:
        found: list[Any] = scoring.predict(
            stepper, task, rows, backbone.tokenizer, cell
        )
        return found

    def validate() -> float:
        predictions = predict(examples.validation)
        scores = scoring.scores(task, predictions, examples.validation)
        # Equal in all ranks, which stop together.
        return stepper.ranks.mean(float(next(iter(scores.values()))))

    clock = StepClock(cell.warmup_steps, cell.device, watch)
    batches = epochs(examples.train, cell)
    losses: list[float] = []
    watched = contextlib.nullcontext() if watch is None else watch.training()
    try:
        with watched:
            for loss in train(stepper, cell, batches, clock, validate, checkpoint):
                losses.append(loss)
    finally:
        partial.note(
            num_steps=len(losses),
            loss_curve=[finite(loss) for loss in losses],
            loss_mean="tokens" if prepare.num_labels_of(task) is None else "labels",
            all_step_seconds=clock.all_step_seconds,
            step_seconds=clock.step_seconds,
            step_seconds_iqr=clock.step_seconds_iqr,
        )
    if task.metric is not None:
        predictions = predict(examples.evaluation)
        scores = scoring.scores(task, predictions, examples.evaluation)
        majority = scoring.majority(task)
        if isinstance(task, Task) and task.mismatched:
            other = dataclasses.replace(task, evaluation=task.mismatched)
            predicted = predict(examples.mismatched)
            found = scoring.scores(other, predicted, examples.mismatched)
            constant = scoring.majority(other)
            scores |= {f"{name}_mismatched": value for name, value in found.items()}
            majority |= {f"{name}_mismatched": v for name, v in constant.items()}
        ranks = ("", "second_", "third_")
        for rank, (name, score) in zip(ranks, scores.items(), strict=False):
            partial.note(
                **{
                    f"{rank}score_name": name,
                    f"{rank}score": finite(score),
                    f"{rank}majority_score": finite(majority[name]),
                }
            )
        if isinstance(task, RecallTask):
            bits = recall.recalled_bits(task, predictions, examples.evaluation)
            partial.note(recalled_bits=bits)
        right = scoring.is_right(task, predictions, examples.evaluation)
        partial.note(
            num_eval_rows=len(task.evaluation),
            right_rows=None if right is None else [int(r) for r in right],
            row_scores=scoring.row_scores(task, predictions, examples.evaluation),
        )
    partial.note(peak_host_bytes=memory.host_peak_bytes())
