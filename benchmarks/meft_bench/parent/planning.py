"""The commands `plan` and `fit`: the memory of a step on a GPU, without one.

The plans are made in one child process (`virtual/prediction/planner.py`); this module
builds the request; `plan_text` shows the answer.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meft_bench.parent import fields, output
from meft_bench.parent.engines import isolate
from meft_bench.parent.own import backbones as own_backbones
from meft_bench.parent.own import methods as own_methods
from meft_bench.shared import (
    configs,
    lengths,
    methods,
    quantisations,
    registry,
    request,
)
from meft_bench.shared.backbones import TABLE
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.own import PYTHON
from meft_bench.shared.request import WORKER
from meft_bench.shared.source import MissingError
from meft_bench.virtual.device import gpu

ALIASES = {"exact": "meft1-exact"}
FIELDS = {"batch": "batch_size", "seq": "seq_len", "depth": "depth"}
"""Values of `--maximize`, with the fields that they set."""
FLAGS = {
    "method": "--method",
    "backbone": "the first argument",
    "device": "--gpu",
    "batch_size": "--batch",
    "seq_len": "--seq",
    "depth": "--depth",
    "dtype": "--dtype",
    "weights_dtype": "--weights-dtype",
    "accumulation": "--accumulation",
    "attention": "--attention",
    "padding": "--padding",
}
"""Fields that `--set` does not accept, with the flags that set them."""
USUAL_TASK = ""
"""The task of a plan, unless one is set: that of the head its model usually has."""
DEFAULTS = {"batch": 8, "seq": 512, "depth": 0}
PADDINGS = {"none": ["none"], "some": ["some"], "worst": ["some", "none"]}
"""Values of `--padding`, with the batches that are planned."""
STDERR = 2
"""File descriptor of the standard error output."""
AT_MOST = {"batch_size": 1 << 16, "seq_len": 1 << 20, "depth": 1000}


class PlanningError(Exception):
    """Raised for a request that cannot be planned; the message is one line."""


def script(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the request for code of the user, `--script FILE:FUNCTION`.

    Raises:
        PlanningError: there is no such file or GPU, or an option has no effect.
    """
    given: dict[str, Any] = vars(arguments)
    of_backbones = {
        "the backbone": given["backbone"],
        **{f"--{name}": given[name] for name in ("method", "set", "weights_dtype")},
        **{f"--{name}": given[name] for name in FIELDS},
        "--accumulation": given["accumulation"] != 1,
        "--dtype": given["dtype"] != "fp32",
        "--attention": given["attention"] != "sdpa",
        "--maximize": given.get("maximize", "batch") != "batch",
        "--multiple": given.get("multiple", 1) != 1,
        "--output": given.get("output"),
    }
    idle = [name.replace("_", "-") for name, value in of_backbones.items() if value]
    if idle:
        raise PlanningError(
            f"with --script, the function decides, not {', '.join(idle)}"
        )
    file, _, function = arguments.script.rpartition(":")
    path = Path(file)
    if not file or not function.isidentifier():
        raise PlanningError(
            f"--script {arguments.script!r} should be FILE:FUNCTION, such as "
            "train.py:step"
        )
    if not path.is_file():
        raise PlanningError(f"--script: there is no file {file!r}")
    return {
        "file": str(path.resolve()),
        "function": function,
        "gpu": _gpu(arguments.gpu),
        "padding": arguments.padding != "none",
        "ranks": arguments.ranks,
    }


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return a cell for each requested method.

    Raises:
        PlanningError: no such method, backbone or GPU, or no config of the backbone.
    """
    if arguments.backbone is None:
        raise PlanningError("give a backbone, or --script FILE:FUNCTION")
    if arguments.ranks != 1:
        raise PlanningError(
            f"--ranks {arguments.ranks}: a cell trains in one process; give --script "
            "FILE:FUNCTION with a step that shards or replicates its model"
        )
    name = _gpu(arguments.gpu)
    try:
        backbone = _backbone(arguments.backbone)
        allow = arguments.allow_download
        model_type = configs.check(backbone, allow_download=allow, any_type=True)
    except (ValueError, MissingError) as error:
        raise PlanningError(str(error)) from error
    values: dict[str, Any] = {
        "backbone": backbone,
        "dtype": arguments.dtype,
        "weights_dtype": arguments.weights_dtype or "fp32",
        "accumulation": arguments.accumulation,
        "attention": arguments.attention,
        "device": f"{registry.VIRTUAL}{name}",
    }
    for flag, field in FIELDS.items():
        given = getattr(arguments, flag)
        if given is not None and flag == getattr(arguments, "maximize", None):
            raise PlanningError(
                f"--{flag} {given} has no effect with --maximize {flag}; leave it out, "
                f"or maximize one of {', '.join(f for f in FIELDS if f != flag)}"
            )
        if flag == "seq" and given is not None:
            given = _longest(given)
        values[field] = DEFAULTS[flag] if given is None else given
    kind = TABLE.get(model_type or "")
    if kind and kind.has_eager_attention_only and arguments.attention == "sdpa":
        values["attention"] = "eager"
    values |= _set_fields(arguments.set)
    if "task" not in values:
        values["task"] = USUAL_TASK
    names = _methods(arguments.method, model_type)
    if (
        arguments.method in ([], ["all"])
        and values["weights_dtype"] in quantisations.TABLE
    ):
        refused = {*registry.TRAIN_BACKBONE, *registry.FLOATS_ONLY}
        names = [name for name in names if name not in refused]
    found = [
        Cell(**methods.with_defaults({"method": name, **values})) for name in names
    ]
    for cell in found:
        try:
            # Which one it is depends on the config; the child refuses what it cannot.
            task = cell.task or registry.SYNTHETIC_TASKS[-1]
            fields.check_together(dataclasses.replace(cell, task=task))
        except ValueError as error:
            raise PlanningError(str(error)) from error
    return found


def ask(
    cells: Sequence[Cell],
    options: ChildOptions,
    *,
    maximize: str | None,
    margin: float,
    timeline: bool = False,
    seq: Sequence[str] = (),
    padding: str = "worst",
    multiple: int = 1,
) -> list[dict[str, Any]]:
    """Return the plan of each cell, or of the largest that fits, as JSON objects.

    Args:
        cells: the cells to plan.
        options: options of the child.
        maximize: one of `FIELDS`, or None for the cells as they are.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        timeline: whether a plan includes every change of memory during its step.
        seq: lengths of the batches, as `meft_bench.shared.lengths` reads them; none for
            those of the cells.
        padding: one of `PADDINGS`.
        multiple: what the largest value is a multiple of.

    Raises:
        PlanningError: the child ended without an answer; the message states why.
        OSError: there is no room for its answer.
    """
    field = None if maximize is None else FIELDS[maximize]
    plan = {
        "cells": [cell.to_json() for cell in cells],
        "maximize": field,
        "at_most": AT_MOST.get(field or ""),
        "multiple": multiple,
        "margin": margin,
        "timeline": timeline,
        "seq": list(seq),
        "paddings": PADDINGS[padding],
    }
    return _answer(plan, options)


def ask_script(
    request: dict[str, Any],
    options: ChildOptions,
    *,
    maximize: bool,
    margin: float,
    timeline: bool = False,
) -> list[dict[str, Any]]:
    """Return the plan of code of the user, as a list of one JSON object.

    Args:
        request: the result of `script`.
        options: options of the child.
        maximize: whether to find the largest batch size.
        margin: share of the GPU's memory that must stay free for the verdict `fits`.
        timeline: whether the plan includes every change of memory.

    Raises:
        PlanningError: the child ended without an answer; the message states why.
        OSError: there is no room for its answer.
    """
    plan = {
        "script": request,
        "at_most": AT_MOST["batch_size"] if maximize else None,
        "margin": margin,
        "timeline": timeline,
    }
    return _answer(plan, options)


def _answer(plan: dict[str, Any], options: ChildOptions) -> list[dict[str, Any]]:
    """Return the plans of one child process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plans.json")
        body = {"plan": plan, "options": options.to_json()}
        with subprocess.Popen(
            request.command(body, out, worker_module=WORKER),
            stdin=subprocess.DEVNULL,
            # What a script of the user prints is shown, apart from the answer.
            stdout=STDERR if "script" in plan else subprocess.PIPE,
            stderr=None if "script" in plan else subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(options),
        ) as child:
            last = ""
            for line in child.stdout or ():
                if line.startswith(request.MARK):
                    output.complain(line.rstrip())
                else:
                    last = line.strip() or last
        if not out.is_file():
            last = last or f"it said nothing and ended with {child.returncode}"
            raise PlanningError(f"the planner ended without an answer: {last}")
        plans: list[dict[str, Any]] = json.loads(out.read_text())["plans"]
    return plans


def _environment(options: ChildOptions) -> dict[str, str]:
    """Return the environment of the planner.

    Workspaces of cuBLAS have the size that they have in people's own runs, and not the
    one that makes the cells of a sweep deterministic.
    """
    found = isolate.child_environment(options, registry.VIRTUAL)
    own = os.environ.get(isolate.WORKSPACES)
    if own is None:
        del found[isolate.WORKSPACES]
        return found
    return found | {isolate.WORKSPACES: own}


def unanswered(plans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the plans that contain only the reason why there is no plan."""
    return [plan for plan in plans if plan["verdict"] == "unknown"]


def anything_fits(plans: Sequence[dict[str, Any]]) -> bool:
    """Return whether one of the methods fits, with the maximized value if given."""
    return any(
        plan["verdict"] in ("fits", "tight") and plan.get("largest", 1)
        for plan in plans
    )


def _longest(texts: Sequence[str]) -> int:
    """Return the largest number of tokens that `--seq` names."""
    try:
        lengths.check(texts)
    except ValueError as error:
        raise PlanningError(f"--seq: {error}") from error
    return int(fields.check("seq_len", lengths.longest(texts)))


def _set_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Return the fields that `--set` names, each once."""
    found: dict[str, Any] = {}
    for text in texts:
        name, value = _field(text)
        if name in FLAGS:
            raise PlanningError(f"{text!r}: `{name}` is set by {FLAGS[name]}")
        if name in found:
            raise PlanningError(f"{text!r}: `{name}` is set twice; keep one")
        found[name] = value
    return found


def _field(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE` as a field of a cell."""
    name, equals, value = text.partition("=")
    if not equals:
        raise PlanningError(f"{text!r}: write `--set NAME=VALUE`")
    try:
        fields.check_name(name)
        return name, fields.check(name, _typed(name, value))
    except ValueError as error:
        raise PlanningError(f"{text!r}: {error}") from error


def _typed(name: str, text: str) -> fields.Value:
    """Convert text to the field's type; return the text itself where that fails."""
    kind = fields.FIELDS[name].type
    try:
        return text if kind is str else kind(text)  # type: ignore[operator]
    except ValueError:
        return text  # which `fields.check` rejects by name


def _methods(given: Sequence[str], model_type: str | None) -> list[str]:
    """Return methods by their registered names, each once.

    Args:
        given: names on the command line.
        model_type: type of the model, which decides what all of them are; None if it is
            not known yet.
    """
    known = [*ALIASES, *registry.METHODS]
    is_known = model_type is None or model_type in registry.MODEL_TYPES
    every = registry.METHODS if is_known else registry.METHODS_OF_ANY_MODEL
    if not given:
        return [name for name in every if name in registry.USUAL_METHODS]
    found: list[str] = []
    for name in given:
        if name == "all":
            found += every
        elif name.startswith((*registry.PEFT, PYTHON)):
            found.append(_own(name))
        elif name in known:
            found.append(ALIASES.get(name, name))
        else:
            forms = (f"{registry.PEFT[0]}CONFIG", f"{PYTHON}FILE.py:FUNCTION")
            hint = registry.nearest(name, ["all", *known, *forms])
            raise PlanningError(f"unknown method {name!r}; {hint}")
    return list(dict.fromkeys(found))


def _own(text: str) -> str:
    """Return a method of the user with the whole path of its file.

    Raises:
        PlanningError: there is no such file, type of adapter or function; or it has
            training parameters, which a plan has not.
    """
    try:
        found = own_methods.find(text, Path.cwd())
    except ValueError as error:
        raise PlanningError(f"--{error}") from error
    assert found is not None
    if found.settings:
        names = ", ".join(found.settings)
        raise PlanningError(
            f"--method {text}: its training parameters set {names}, and a plan takes "
            "these from the command line: name its adapter_config.json"
        )
    return found.place


def named(cell: Cell) -> Cell:
    """Return a cell with digests in the place of the paths of files."""
    method = own_methods.find(cell.method, Path.cwd())
    backbone = own_backbones.find(cell.backbone, Path.cwd())
    return dataclasses.replace(
        cell,
        method=method.value if method else cell.method,
        backbone=backbone.value if backbone else cell.backbone,
    )


def _gpu(given: str) -> str:
    """Return the full name of a GPU, or the path of its file, which is valid."""
    try:
        name = gpu.resolve(given)
        gpu.find(name)
    except ValueError as error:
        raise PlanningError(str(error)) from error
    return name


def _backbone(given: str) -> str:
    """Return a backbone as a cell names it: shapes by their name, files by their path.

    Raises:
        ValueError: there is no such backbone.
    """
    if given in {**registry.RANDOM_BACKBONES, **registry.PLANNED_BACKBONES}:
        return f"random:{given}"
    path = Path(given)
    if path.is_dir():
        return f"dir:{path.resolve()}"
    if given in registry.PACKAGED_BACKBONES or ":" in given:
        return str(fields.check("backbone", given))
    if path.suffix == ".json":
        return f"random:{path.resolve()}"
    valid = [*registry.RANDOM_BACKBONES, *registry.PLANNED_BACKBONES]
    valid += registry.PACKAGED_BACKBONES
    hint = registry.nearest(given, [*valid, "DIRECTORY", "hub:NAME"])
    raise PlanningError(f"unknown backbone {given!r}; {hint}")
