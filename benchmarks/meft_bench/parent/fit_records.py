"""Records of the command `fit`: the largest cell that fits, as a file of a run has it.

The cell is the requested one with the value that was found. It is not run: what it has
of a measurement is its plan. Where not even the smallest value fits, the record has the
status `oom` and the cell that value.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meft_bench.shared.cell import Cell
from meft_bench.shared.measurement import Measurement
from meft_bench.shared.record import Environment, Record, Status
from meft_bench.virtual.device import gpu
from meft_bench.virtual.device.allocator import settings_in_words
from meft_bench.virtual.prediction import plan_text

QUESTION = "What is the {largest} with which a step fits?"
LARGEST = {"seq_len": "longest sequence", "batch_size": "largest batch"}


def caveat_of(margin: float, multiple: int, seq: Sequence[object], padding: str) -> str:
    """Return what a reader must know, which is also what the search has asked.

    Args:
        margin: the share of the memory that is left free.
        multiple: the value is a multiple of this number.
        seq: lengths of batches, as they were given.
        padding: whether batches have padding, as it was given.
    """
    lengths = f", lengths {' '.join(map(str, seq))}" if seq else ""
    # The environment decides how much is reserved for the same step.
    allocator = f"; {words}" if (words := settings_in_words()) else ""
    return (
        f"Predicted, with {100 * margin:g}% of the memory left free, among multiples "
        f"of {multiple}, padding {padding}{lengths}; copies between host and device "
        f"include the batch{allocator}."
    )


def sweep_of(field: str) -> str:
    """Return what records call the search for the largest value of a field."""
    return f"fit-{field}"


def left(
    cells: Sequence[Cell],
    records: Iterable[Record],
    environments: Mapping[str, Environment],
    field: str,
    caveat: str,
) -> list[Cell]:
    """Return the cells whose largest value is not in a file yet.

    Args:
        cells: the requested cells.
        records: what the file holds.
        environments: the environments of the command, by `Cell.device`.
        field: the field that is maximized.
        caveat: what a record of the same search has as its caveats.
    """
    codes = {device: here.code_sha256 for device, here in environments.items()}
    found = {
        _without(one.cell, field)
        for one in records
        if one.sweep == sweep_of(field)
        and one.sweep_caveats == caveat
        and one.environment.code_sha256 == codes.get(one.cell.device)
    }
    return [cell for cell in cells if _without(cell, field) not in found]


def _without(cell: Cell, field: str) -> Cell:
    """Return the cell without what the search decides: the value, and the head."""
    defaults = {one.name: one.default for one in dataclasses.fields(Cell)}
    changes: dict[str, Any] = {field: defaults[field], "task": ""}
    return dataclasses.replace(cell, **changes)


NOT_LIMITED = "memory is not the limit: "
"""How the message of an answer starts that memory does not limit."""


def _message(plan: Mapping[str, Any], fits: bool) -> str:
    if not fits:
        return plan["message"] or "needs more than the margin leaves"
    limit = plan_text.limit_of(plan)
    return f"{NOT_LIMITED}{limit}" if limit else ""


def record(
    cell: Cell,
    plan: Mapping[str, Any],
    *,
    field: str,
    caveat: str,
    environment: Environment,
    started_at: str,
    wall_seconds: float,
) -> Record:
    """Return the record of an answer.

    Args:
        cell: the requested cell.
        plan: the answer, as `fit` prints it with `--json`.
        field: the field that was maximized.
        caveat: what a reader must know.
        environment: where the command ran.
        started_at: UTC, ISO 8601.
        wall_seconds: time of the search.
    """
    changes: dict[str, Any] = {field: plan["largest"] or plan["multiple"]}
    changes["task"] = plan["task"] or cell.task
    fits = plan["largest"] > 0
    found = gpu.find(gpu.name_in(cell.device))
    sent, received = plan["d2h_bytes"], plan["h2d_bytes"]
    return Record(
        sweep=sweep_of(field),
        sweep_question=QUESTION.format(largest=LARGEST[field]),
        sweep_caveats=caveat,
        cell=dataclasses.replace(cell, **changes),
        status=Status.OK if fits else Status.OOM,
        message=_message(plan, fits),
        memory_breakdown=plan["memory_breakdown"],
        started_at=started_at,
        wall_seconds=wall_seconds,
        measurement=Measurement(
            num_trainable_parameters=plan["num_trainable_parameters"],
            peak_allocated_bytes=plan["allocated_bytes"],
            peak_reserved_bytes=plan["reserved_bytes"],
            h2d_bytes=received,
            d2h_bytes=sent,
            seconds_at_least=plan["seconds_at_least"],
            link_seconds_at_least=(
                None
                if sent is None or received is None
                else (sent + received) / found.link_bytes_per_second
            ),
        ),
        environment=dataclasses.replace(
            environment,
            device_name=found.name,
            prediction=plan["prediction"],
            weights_origin=f"shapes only; {cell.backbone}",
            data_origin="shapes only",
        ),
    )
