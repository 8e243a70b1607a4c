"""The child of `plan` and `fit`: one process that makes all plans.

    python -m meft_bench.virtual.planner --request JSON --out PATH --parent PID

A request holds cells, which of their fields to maximize, if any, and the options of a
child. PATH gets one JSON object for each cell, in order, whole or not at all.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from meft_bench import outcome
from meft_bench.cell import Cell
from meft_bench.leash import die_with_parent
from meft_bench.options import ChildOptions
from meft_bench.source import Source


def main() -> None:
    """Answer the request of the command line."""
    parser = argparse.ArgumentParser(description="Make plans; for meft-bench itself.")
    parser.add_argument("--request", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--parent", required=True, type=int)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    outcome.leave(arguments.out, answer(json.loads(arguments.request)))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`{"plans": [...]}`; with `maximize`, each also has the `largest` value."""
    cells = [Cell.from_json(fields) for fields in request["cells"]]
    options = ChildOptions.from_json(json.dumps(request["options"]))
    if not options.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported here, as the environment is looked at when they are.
    import torch

    from meft_bench.virtual.plan import plan

    torch.set_num_threads(options.num_threads)
    source = Source(allow_download=options.allow_download)
    field = request["maximize"]
    if field is not None:
        return {"plans": [_fit(cell, field, request, source) for cell in cells]}
    margin, timeline = request["margin"], request["timeline"]
    return {"plans": [plan(cell, source, margin, timeline).to_json() for cell in cells]}


def _fit(
    cell: Cell, field: str, request: dict[str, Any], source: Source
) -> dict[str, Any]:
    from meft_bench.virtual import gpu
    from meft_bench.virtual.fit import largest_that_fits
    from meft_bench.virtual.plan import Plan, plan

    plans: dict[int, Plan] = {}
    margin: float = request["margin"]

    def needed(value: int) -> float:
        plans[value] = plan(_changed(cell, field, value), source, margin)
        size = plans[value].needed_bytes
        return float("inf") if size is None else size

    room = (1 - margin) * gpu.find(gpu.name_in(cell.device)).memory_bytes
    found = largest_that_fits(needed, room, request["at_most"])
    told = plans[max(found.largest, 1)].to_json()
    beyond = plans.get(found.largest + 1)
    return told | {
        "maximized": field,
        "largest": found.largest,
        "num_probes": len(found.probes),
        "beyond_bytes": None if beyond is None else beyond.needed_bytes,
        "beyond_message": "" if beyond is None else beyond.message,
    }


def _changed(cell: Cell, field: str, value: int) -> Cell:
    changes: dict[str, Any] = {field: value}
    return dataclasses.replace(cell, **changes)


if __name__ == "__main__":
    main()
