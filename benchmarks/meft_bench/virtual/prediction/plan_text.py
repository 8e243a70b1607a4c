"""The plans of a step as text: a table, the details of one, and a timeline as CSV."""

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meft_bench.shared.cell import Cell
from meft_bench.shared.units import format_bytes
from meft_bench.virtual.device import gpu

MIB = 2**20
NUM_SHOWN = 8
"""Number of lines of each part of the details."""
SIZES = {
    "needed_bytes": "needed",
    "process_bytes": "nvidia-smi",
    "reserved_bytes": "reserved",
    "allocated_bytes": "allocated",
}
"""The peaks of a plan, with the words for them."""
HEADS = {"synthetic": "classifier", "synthetic-lm": "language model"}
"""Tasks, with the words for the models that learn them."""
WITH = {
    "none": "without padding",
    "some": "with padding",
    "any": "with or without padding, which needs the same",
}
"""Paddings of a plan, with the words for them."""
NOTE = (
    "Predicted from fake tensors and a model of the caching allocator, {basis}. "
    "`nvidia-smi` shows reserved memory and what the driver takes, about "
    "{context}{as_on}. `needed` is what it would show if the allocator had kept no "
    "memory from earlier steps; it decides the verdict. `fits` leaves {margin:.0%} "
    "free."
)


LOGITS = (
    "the logits of all tokens exist at once: `--set loss_chunk_tokens=1024` computes "
    "the loss in parts of 1024 tokens, and `mlp_chunks=8` the MLP of reversible and "
    "checkpointed blocks in 8 parts"
)


def table(
    cells: Sequence[Cell],
    plans: Sequence[dict[str, Any]],
    maximize: str | None,
    margin: float,
    seq: Sequence[str] = (),
) -> str:
    """Return the answer as a readable table.

    Args:
        cells: the planned cells.
        plans: their plans, in the same order.
        maximize: one of `planning.FIELDS`, or None.
        margin: share of the GPU's memory that must stay free.
        seq: what was given as `--seq`.
    """
    first = cells[0]
    found = gpu.find(gpu.name_in(first.device))
    planned = [p["seq_len"] for p in plans if p.get("seq_len")]
    tokens = str(max(planned, default=first.seq_len))  # those of an image are its own
    tokens = f"{'at most ' * (len(seq) > 1)}{tokens}"
    shape = {"batch": f"batch {first.batch_size}", "seq": f"{tokens} tokens"}
    given = [words for name, words in shape.items() if name != maximize]
    size = format_bytes(found.memory_bytes)
    shown = ", ".join([*given, first.dtype, f"weights {first.weights_dtype}"])
    heads = dict.fromkeys(HEADS[p["task"]] for p in plans if p.get("task"))
    head = "".join(f" as a {one}" for one in heads)
    lines = [f"{first.backbone}{head} on {found.name} ({size}): {shown}"]
    lines += _aligned([_header(maximize), *(_row(plan, maximize) for plan in plans)])
    lines += reasons(plans)
    room = (1 - margin) * found.memory_bytes / MIB
    lines += [
        _beyond(p, maximize, room)
        for p in plans
        if maximize is not None and p.get("beyond_bytes") is not None
    ]
    lines += [
        f"{p['method']}: no {maximize} above {p['largest']}: {p['beyond_message']}"
        for p in plans
        if p.get("beyond_bytes") is None and p.get("beyond_message")
    ]
    lines += _bounds(plans, maximize)
    is_lm = any(p.get("task") == "synthetic-lm" for p in plans)
    if maximize == "seq" and is_lm and not first.loss_chunk_tokens:
        lines.append(LOGITS)
    lines += [
        f"{p['method']}: shown for {p['seq_len']} tokens per row, {WITH[p['padding']]}"
        for p in plans
        if p.get("seq_len") is not None
    ]
    lines.append(_note(found, margin))
    lines += _of_times(plans, found)
    lines += _remarks([plan for plan in plans if plan["by_kind"] is not None])
    if first.dtype == "bf16" and not found.computes_in_bf16:
        lines.append(
            f"{found.name} emulates BF16: the dtype that such a GPU trains in is fp16."
        )
    return "\n".join(lines)


def summary(
    found: gpu.Gpu, plan: dict[str, Any], margin: float, maximize: str | None = None
) -> str:
    """Return the plan of code of the user as a readable text, with its details.

    Args:
        found: the GPU.
        plan: the plan.
        margin: share of the GPU's memory that must stay free.
        maximize: what was maximized, or None.
    """
    lines = [f"{found.name} ({format_bytes(found.memory_bytes)})"]
    columns = zip(_header(maximize), _row(plan, maximize), strict=True)
    known = [column for column in columns if column[1]]  # code has no method
    lines += _aligned([*zip(*known, strict=True)])
    lines += [plan["message"]] * bool(plan["message"])
    lines += _bounds([plan], maximize)
    if maximize is not None and plan.get("beyond_bytes") is not None:
        room = (1 - margin) * found.memory_bytes / MIB
        lines.append(_beyond(plan, maximize, room))
    if plan.get("num_steps", 1) > 1:
        steps = plan["num_steps"]
        lines.append(
            f"TFLOP, times and host to device are sums over {steps} steps and "
            "what was copied before them."
        )
    if plan.get("beyond_message"):
        beyond = f"{maximize} {_next(plan)}"
        lines.append(f"{plan['method']}: {beyond}: {plan['beyond_message']}")
    lines += [details(plan), _note(found, margin)]
    lines += _remarks([plan])
    return "\n".join(lines)


def _next(plan: Mapping[str, Any]) -> int:
    """Return the value that was found not to fit, or would be tried next."""
    return int(plan["largest"] + plan.get("multiple", 1))


def _beyond(plan: dict[str, Any], maximize: str, room: float) -> str:
    """Return what the next value would need, and of how much.

    Args:
        plan: the plan of the largest value that fits.
        maximize: what was maximized.
        room: the memory that may be used, in MiB.
    """
    return (
        f"{plan['method']}: {maximize} {_next(plan)} would need "
        f"{plan['beyond_bytes'] / MIB:,.0f} MiB, of {room:,.0f} MiB that may be used"
    )


def _bounds(plans: Sequence[dict[str, Any]], maximize: str | None) -> list[str]:
    """Return a line for each plan whose largest value memory does not limit."""
    return [
        f"{plan['method']}: {maximize} {plan['largest']} fits, and {limit}"
        for plan in plans
        if maximize is not None and (limit := limit_of(plan))
    ]


def limit_of(plan: Mapping[str, Any]) -> str:
    """Return what limits the largest value of an answer; empty if memory does."""
    if _next(plan) <= plan.get("at_most", math.inf):
        return ""
    return str(plan.get("limit") or "is the most tried")


def _of_times(plans: Sequence[dict[str, Any]], found: gpu.Gpu) -> list[str]:
    """Return what the times of a table mean, where something is copied."""
    if not any(plan.get("h2d_bytes") or plan.get("d2h_bytes") for plan in plans):
        return []
    most = max(plan.get("host_bytes_touched") or 0 for plan in plans)
    of_host = f"what the host reads and writes (at most {format_bytes(most)})"
    rate = found.host_bytes_per_second
    return [
        "`minimum time` is that of the GPU's arithmetic and memory at the vendor's "
        "rates; `with copies` also has the link"
        + (
            f" and {of_host}, at {rate / 1e9:g} GB/s"
            if rate
            else f", but not {of_host}, unless the GPU's file has "
            "`host_bytes_per_second`"
        )
        + ". Both are bounds: each phase takes as long as its slowest part."
    ]


def _remarks(plans: Sequence[dict[str, Any]]) -> list[str]:
    """Return what was assumed or ignored, each once."""
    words = "(?:assumed|not modelled): .*?(?=; assumed: |; not modelled: |$)"
    found = [remark for p in plans for remark in re.findall(words, p["prediction"])]
    return list(dict.fromkeys(found))


def _note(found: gpu.Gpu, margin: float) -> str:
    return NOTE.format(
        basis=found.basis,
        context=format_bytes(found.context_bytes),
        as_on="" if found.compared == "us" else ", as on an H200",
        margin=margin,
    )


def reasons(plans: Sequence[dict[str, Any]]) -> list[str]:
    """Return the messages of the plans, one line per message with all its methods."""
    methods: dict[str, list[str]] = {}
    for plan in plans:
        if plan["message"]:
            methods.setdefault(plan["message"], []).append(plan["method"])
    return [f"{', '.join(names)}: {message}" for message, names in methods.items()]


def details(plan: dict[str, Any]) -> str:
    """Return a readable breakdown of the memory and the traffic of one plan."""
    lines = [f"{plan['method'] or 'memory'}:"]
    if plan["by_kind"] is None:
        return lines[0] + " no plan"
    sums = {
        "at the peak, by kind": plan["by_kind"],
        "peak, by phase": plan["by_phase"],
        "at the peak, by block": plan["by_block"],
        "at the peak, by operator": plan["by_operator"],
        "saved for backward, by block": plan["saved_by_block"],
        "between host and device, by phase": _moved(plan, "direction", "phase"),
        "between host and device, by block": _moved(
            plan, "direction", "phase", "block"
        ),
    }
    for title, parts in sums.items():
        shown = dict(list(parts.items())[:NUM_SHOWN])
        rest = sum(parts.values()) - sum(shown.values())
        rows = [[f"    {name or '-'}", format_bytes(n)] for name, n in shown.items()]
        if len(parts) > NUM_SHOWN and title != "peak, by phase":
            more = f"    {len(parts) - NUM_SHOWN} more"
            rows.append([more, format_bytes(rest)])
        lines += [f"  {title}", *_aligned(rows)]
    lines.append(f"  unattributed {format_bytes(plan['unattributed_bytes'])}")
    lines.append("  least time, by phase")
    lines += _aligned(
        [
            [f"    {its['phase']}", f"{its['seconds']:.3g} s", its["bound"]]
            for its in plan["phases"] or ()
            if its["seconds"]
        ]
    )
    lines.append("  largest at the peak")
    lines += _aligned(
        [
            [
                f"    {format_bytes(one['num_bytes'])}",
                f"{one['dtype']} {one['shape']}",
                one["kind"],
                f"{one['operator']} of {one['module'] or '-'}",
            ]
            for one in plan["alive"]
        ]
    )
    return "\n".join(lines)


def _moved(plan: Mapping[str, Any], *names: str) -> dict[str, int]:
    """Return the copied bytes of a plan, summed by some of their fields."""
    sums: Counter[str] = Counter()
    for part in plan["moved"] or ():
        if part["num_bytes"]:
            sums[" ".join(part[name] for name in names)] += part["num_bytes"]
    return dict(sums)


def write_timeline(plans: Sequence[dict[str, Any]], path: Path) -> None:
    """Write every change of memory of each plan's step as CSV, atomically."""
    moments = [
        {"method": plan["method"]} | moment
        for plan in plans
        for moment in plan.pop("timeline") or ()
    ]
    names = dict.fromkeys(name for moment in moments for name in moment)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(names), restval=0)
            writer.writeheader()
            writer.writerows(moments)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) for text, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _header(maximize: str | None) -> list[str]:
    header = ["method", "verdict", *SIZES.values()]
    if maximize is not None:
        header.insert(1, f"largest {maximize}")
    header += ["trainable", "TFLOP", "minimum time", "with copies", "host to device"]
    return [*header, "largest kinds", "peak at"]


def _row(plan: dict[str, Any], maximize: str | None) -> list[str]:
    sizes = ["-" if plan[name] is None else format_bytes(plan[name]) for name in SIZES]
    row = [plan["method"], plan["verdict"], *sizes]
    if maximize is not None:
        row.insert(1, str(plan["largest"]))
    if plan["by_kind"] is None:
        return [*row, *["-"] * 7]
    kinds = sorted(plan["by_kind"].items(), key=lambda item: -item[1])[:3]
    return [
        *row,
        f"{plan['num_trainable_parameters']:,}",
        f"{plan['num_flops'] / 1e12:.1f}",
        f"{plan['seconds_at_least']:.3g} s",
        f"{plan['step_seconds_at_least']:.3g} s",
        "-" if plan["h2d_bytes"] is None else format_bytes(plan["h2d_bytes"]),
        ", ".join(f"{kind} {format_bytes(size)}" for kind, size in kinds),
        plan["where"],
    ]
