"""What cells take of a real GPU, predicted, so that several can share it.

    bytes of a cell = peak of its process on the virtual GPU of the same model
                      x (1 + MARGIN)

The virtual GPU (`meft_bench.virtual`) plans a training step in a child that needs no
GPU. The peak is that of the step with the longest rows, with padding or without,
whichever takes more. There is no prediction, so that the cell is not packed, for

    a GPU that no file of `virtual/device/gpus` describes
    a step that does not fit, or cannot be planned
    a `reference`: the process has two models
    a task that generates, or a function of the user: scoring may take more than a step

Cells that differ in what no memory depends on are planned once.
"""

import dataclasses
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_bench.parent.engines import child_process, isolate
from meft_bench.parent.engines.job import Job
from meft_bench.shared import request, tasks
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import DATA, Own, located
from meft_bench.shared.registry import (
    LANGUAGE_MODEL_TASKS,
    SYNTHETIC_TASKS,
    VIRTUAL,
)
from meft_bench.shared.tasks.facts import WORDS
from meft_bench.virtual.device import gpu

MARGIN = 0.1
"""Share by which a cell may take more than was predicted.

Predicted peaks of processes were within a few percent of an H200's
(docs/virtual-gpu.md); scoring and what libraries load later come on top.
"""
CELLS_PER_CHILD = 32
"""Cells that one child plans: their request has to fit into an argument."""
CLASSIFIED = (f"{DATA}classification-", f"{DATA}regression-")
RANKED = (f"{DATA}options-", f"{DATA}language-modelling-")
"""Beginnings of tasks of the user that language models are trained for and rank."""


def predict(
    cells: Sequence[Cell],
    models: Iterable[str],
    job: Job,
    *,
    folder: Path,
    stop: threading.Event,
) -> dict[Cell, dict[str, int]]:
    """Return the bytes that cells take of each model of GPU.

    Args:
        cells: cells of a real GPU.
        models: models of GPUs, as NVML names them.
        job: the run.
        folder: existing folder for the log of the child.
        stop: when set, the child is killed and `Stopped` is raised.

    Returns:
        Bytes by model of GPU; cells without a prediction are left out.

    Raises:
        Stopped: `stop` was set.
        OSError: the log cannot be written, or no child can be started.
    """
    found: dict[Cell, dict[str, int]] = {}
    for model in dict.fromkeys(models):
        name = _virtual(model)
        if name is None:
            continue
        planned = {cell: _planned(cell, name, job.own) for cell in cells}
        shapes = {one: None for one in planned.values() if one is not None}
        peaks = _peaks([*shapes], job, folder, stop)
        for cell, shape in planned.items():
            if shape in peaks:
                taken = int(peaks[shape] * (1 + MARGIN))
                found.setdefault(cell, {})[model] = taken
    return found


def _virtual(model: str) -> str | None:
    """Return the virtual GPU of a model of GPU, as NVML names it; None if none is."""
    names = (name for name in gpu.names() if gpu.find(name).name == model)
    return next(names, None)


def _planned(cell: Cell, name: str, own: Mapping[str, Own]) -> Cell | None:
    """Return the cell that is planned in the place of another; None if none can be.

    Args:
        cell: a cell of a real GPU.
        name: the virtual GPU.
        own: things of the user, by what cells hold.
    """
    task = _shape_of(cell.task)
    if task is None or cell.reference:
        return None
    planned = dataclasses.replace(
        cell, device=f"{VIRTUAL}{name}", task=task, seed=0, learning_rate=1.0
    )
    return located(planned, own)


def _shape_of(task: str) -> str | None:
    """Return the synthetic task whose steps are like those of a task; None if none."""
    if task in SYNTHETIC_TASKS:
        return task
    classifier, language_model = SYNTHETIC_TASKS
    facts = tasks.TABLE.get(task)
    if task.startswith(CLASSIFIED):
        return classifier
    if task.startswith(RANKED):
        return language_model
    if facts is None or facts.kind == WORDS:
        return None
    return language_model if task in LANGUAGE_MODEL_TASKS else classifier


def _peaks(
    cells: list[Cell], job: Job, folder: Path, stop: threading.Event
) -> dict[Cell, int]:
    """Return the predicted peaks of the processes of cells of virtual GPUs."""
    found = {}
    for start in range(0, len(cells), CELLS_PER_CHILD):
        some = cells[start : start + CELLS_PER_CHILD]
        for cell, plan in zip(some, _plans(some, job, folder, stop), strict=False):
            if plan["verdict"] in ("fits", "tight"):
                found[cell] = int(plan["process_bytes"])
    return found


def _plans(
    cells: list[Cell], job: Job, folder: Path, stop: threading.Event
) -> Iterator[dict[str, Any]]:
    """Yield the plans of some cells; none if the child ended without an answer."""
    log = folder / "packing.log"
    out = log.with_suffix(".json").resolve()
    out.unlink(missing_ok=True)
    options = dataclasses.replace(job.options, memory_limit_bytes=None)
    plan = {
        "cells": [cell.to_json() for cell in cells],
        "maximize": None,
        "margin": 0.0,
        "timeline": False,
        "seq": [],
        "paddings": ["some", "none"],
    }
    child_process.run(
        request.command(
            {"plan": plan, "options": options.to_json()},
            out,
            worker_module=request.WORKER,
        ),
        log=log,
        variables=isolate.child_environment(options, VIRTUAL),
        timeout_seconds=job.timeout_seconds * len(cells),
        stop=stop,
    )
    if out.is_file():
        yield from json.loads(out.read_text(encoding="utf-8"))["plans"]
        out.unlink()
