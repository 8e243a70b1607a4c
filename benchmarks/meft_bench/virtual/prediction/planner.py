"""Run the commands `plan` and `fit` in the child process."""

import dataclasses
import math
from typing import Any

import torch

from meft_bench.child import backbones
from meft_bench.child.backbones import classifier
from meft_bench.shared.cell import Cell
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.source import MissingError, Source
from meft_bench.virtual.device import gpu
from meft_bench.virtual.prediction import progress
from meft_bench.virtual.prediction.fit import largest_that_fits
from meft_bench.virtual.prediction.plan import MemoryPlan, plan


def plan_all(request: dict[str, Any], options: ChildOptions) -> dict[str, Any]:
    """Plan every cell of a request.

    Args:
        request: `script`, a function of the user, or `cells`; `maximize`, the field to
            increase until the cell no longer fits, or None; `at_most`, its upper bound;
            `multiple`, what it is a multiple of; `margin`, the share of the GPU's
            memory to leave free; `timeline`, whether plans list every change of memory
            during the step; `seq`, lengths of batches, and `paddings`, whether they
            have padding, as for `plan`.
        options: options of the child.

    Returns:
        `{"plans": [...]}`, one JSON object for each cell in order; with `maximize`,
        each also has the `largest` value.
    """
    torch.set_num_threads(options.num_threads)
    if "script" in request:
        from meft_bench.virtual.prediction.script import plan_script

        return {"plans": [plan_script(request)]}
    source = Source(allow_download=options.allow_download)
    cells = [Cell.from_json(fields) for fields in request["cells"]]
    field = request["maximize"]
    if field is not None:
        return {"plans": [_fit(cell, field, request, source) for cell in cells]}
    wants = {
        "timeline": request["timeline"],
        "seq": request["seq"],
        "paddings": request["paddings"],
    }
    plans = []
    for cell in cells:
        plans.append(plan(cell, source, request["margin"], **wants))
        if len(cells) > 1 and plans[-1].verdict != "unknown":
            progress.tell_plan(plans[-1])
    return {"plans": [one.to_json() for one in plans]}


def _fit(
    cell: Cell, field: str, request: dict[str, Any], source: Source
) -> dict[str, Any]:
    plans: dict[int, MemoryPlan] = {}
    multiple: int = request["multiple"]
    margin: float = request["margin"]
    room = (1 - margin) * gpu.find(gpu.name_in(cell.device)).memory_bytes

    def needed(count: int) -> float:
        value = count * multiple
        changed = _changed(cell, field, value)
        seq = () if field == "seq_len" else request["seq"]
        paddings = request["paddings"]
        plans[value] = plan(changed, source, margin, seq=seq, paddings=paddings)
        size: float | None = plans[value].needed_bytes
        if size is not None and size <= room and plans[value].verdict == "too large":
            size = math.inf  # what steps before it left behind is in its way
        progress.tell(cell.method, field.partition("_")[0], value, size, room)
        return math.inf if size is None else size

    at_most, limit = request["at_most"], ""
    if field == "seq_len" and (positions := _positions(cell, source)) is not None:
        at_most = min(at_most, positions)
        limit = f"the model has positions for {positions:,} tokens"
    if at_most < multiple:
        raise ValueError(
            f"{field} is at most {at_most}, below the {multiple} whose multiples are "
            "looked among: lower `--multiple`"
        )
    found = largest_that_fits(needed, room, at_most // multiple)
    answer = plans[max(found.largest, 1) * multiple].to_json()
    beyond = plans.get((found.largest + 1) * multiple)
    runs = beyond is not None and found.probes[found.largest + 1] < math.inf
    return answer | {
        "maximized": field,
        "multiple": multiple,
        "largest": found.largest * multiple,
        "at_most": at_most,
        "limit": limit if at_most < request["at_most"] else "",
        "num_probes": len(found.probes),
        "beyond_bytes": beyond.needed_bytes if beyond is not None and runs else None,
        "beyond_message": "" if beyond is None else beyond.message,
    }


def _positions(cell: Cell, source: Source) -> int | None:
    """Return how many tokens the model can take; None if that is not known here."""
    try:
        config, _ = backbones.load_config(cell, source, any_type=True)
    except (MissingError, ValueError):  # which the plan will say
        return None
    return classifier.num_positions(config)


def _changed(cell: Cell, field: str, value: int) -> Cell:
    changes: dict[str, Any] = {field: value}
    return dataclasses.replace(cell, **changes)
