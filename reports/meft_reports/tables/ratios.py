"""Ratios: memory of a MEFT method relative to checkpointed adapters of the same shape.

Both keep some memory per block and run every block twice. The reference keeps one
hidden state, in the dtype of its weights: fp32 weights result in fp32 checkpoints also
under autocast, and quantised ones in checkpoints of the compute dtype. A ratio is
therefore computed within one `weights_dtype`, and the titles state the dtype of the
checkpoints.
"""

from typing import Any

import pandas as pd

from meft_reports.format import (
    NOTHING,
    ShownNumber,
    format_bytes,
    format_count,
    format_error,
    format_ratio,
    is_null,
    with_words,
)
from meft_reports.labels import (
    describe,
    fields_to_show,
    is_quantised,
    option_label,
)
from meft_reports.methods import REFERENCE, is_meft
from meft_reports.summary import (
    PROVENANCE,
    WORKLOAD,
    on_random_input,
    prepare,
    settings,
    split,
    worst,
)
from meft_reports.tables.table import (
    METHOD,
    NUM_CELLS,
    Heading,
    Table,
    join_options,
    notes_on,
)

IGNORED = ("lost_bits", "reference", "max_steps", "warmup_steps")
"""Options shown in columns, and the number of timed steps.

The number of steps has no effect on bytes.
"""
COLUMNS = (
    METHOD,
    Heading("blocks", "Number of blocks of the model."),
    Heading("k", "Bits of the small scale 2^-k of the exact arithmetic."),
    Heading("saved for backward", "Bytes that the method saves for backward."),
    Heading("the reference saves", "Bytes that the reference saves for backward."),
    Heading("saved ratio", "The method's saved bytes divided by the reference's."),
    Heading("peak activation", "Peak of the method's step above its model state."),
    Heading("the reference's peak", "Peak of the reference's step, likewise."),
    Heading("peak ratio", "The method's peak divided by the reference's."),
    Heading(
        "step ratio, median (IQR)",
        "Time of a step of the method divided by one of the reference, which were "
        "timed interleaved in one process.",
    ),
    Heading(
        "worst gradient error",
        "Largest relative error of a gradient against the twin that stores its "
        "activations.",
    ),
    NUM_CELLS,
)
NOTES = (
    f"The reference is {REFERENCE} with bottlenecks of the same width. Bytes are "
    "measured, the mean where there are several cells; below 1 is less than the "
    "reference's. Peak activation is what a step needs above the model state.",
    "A step ratio is only shown where both methods' steps were timed interleaved in "
    "one process.",
)


NEEDS = (
    f"a MEFT method and {REFERENCE}, as a method or as the `reference`, on one "
    "workload of the task synthetic or synthetic-lm"
)
"""What the records must hold for there to be a table."""


def make(frame: pd.DataFrame) -> list[Table]:
    """Return one table per workload with both methods; rows are blocks and k."""
    rows = prepare(frame)
    synthetic = rows[on_random_input(rows)]
    fixed = [name for name in (*WORKLOAD, *PROVENANCE) if name != "depth"]
    parts = [part for _, part in split(synthetic, fixed) if _side_by_side(part)]
    if not parts:
        return []
    always = ("task", "backbone", "dtype", "batch_size", "seq_len", "device")
    shown = fields_to_show(pd.concat(parts), always=always)
    shown = [name for name in shown if name not in ("depth", "weights_dtype")]
    return [_ratios_table(part, describe(part, shown)) for part in parts]


def _side_by_side(part: pd.DataFrame) -> bool:
    """Return whether there are cells of both methods, or cells with the reference.

    The latter are interleaved with it.
    """
    has_reference = (part["method"] == REFERENCE) | (part["reference"] == REFERENCE)
    return bool(has_reference.any() and part["method"].map(is_meft).any())


def _ratios_table(part: pd.DataFrame, workload: str) -> Table:
    ours, references = (
        part[part["method"].map(is_meft)],
        part[part["method"] == REFERENCE],
    )
    rows = []
    for setting in settings(ours, ignoring=IGNORED):
        first = setting.iloc[0]
        name = join_options(first["method"], option_label(first, ours, IGNORED))
        same_width = references[
            references["bottleneck_size"] == first["bottleneck_size"]
        ]
        for key, cells in split(setting, ["num_blocks", "lost_bits"]):
            reference = same_width[same_width["num_blocks"].eq(key["num_blocks"])]
            rows.append(
                (name, *map(format_count, key.values()), *_row(cells, reference))
            )
    weights = part["weights_dtype"].iloc[0]
    if is_quantised(weights):
        workload += f" · {weights} weights"
    return Table(
        title=f"Against {_kept_in(part)} checkpoints of {REFERENCE} · {workload}",
        columns=COLUMNS,
        rows=tuple(rows),
        notes=(*NOTES, _checkpoint_note(part), *notes_on(part)),
    )


def _row(cells: pd.DataFrame, reference: pd.DataFrame) -> tuple[str, ...]:
    texts = []
    for quantity in ("saved_bytes", "peak_activation_bytes"):
        mine, its = _mean(cells, quantity), _mean(reference, quantity)
        ratio = mine / its if mine is not None and its else None
        texts += [_bytes(mine, cells), _bytes(its, reference), format_ratio(ratio)]
    ok = cells[cells["status"] == "ok"]
    return (
        *texts,
        _step_ratio(ok[ok["reference"] == REFERENCE]),
        format_error(worst(ok["gradient_error"])),
        format_count(len(cells)),
    )


def _mean(cells: pd.DataFrame, quantity: str) -> float | None:
    mean = cells.loc[cells["status"] == "ok", quantity].mean()
    return None if is_null(mean) else float(mean)


def _bytes(mean: float | None, cells: pd.DataFrame) -> str:
    failed: list[Any] = cells.loc[cells["status"] != "ok", "status"].tolist()
    return with_words(format_bytes(mean), failed)


def _step_ratio(cells: pd.DataFrame) -> str:
    ratio, iqr = cells["step_ratio"].mean(), cells["step_ratio_iqr"].mean()
    if is_null(ratio):
        return NOTHING
    text = f"{format_ratio(ratio)} ({format_ratio(iqr)})"
    return ShownNumber(text, "", ratio, IQR=iqr)


def _kept_in(part: pd.DataFrame) -> str:
    """Return the dtype of the checkpoints of the reference."""
    dtype, compute = part["weights_dtype"].iloc[0], part["dtype"].iloc[0]
    return str(compute if is_quantised(dtype) else dtype)


def _checkpoint_note(part: pd.DataFrame) -> str:
    dtype, compute = part["weights_dtype"].iloc[0], part["dtype"].iloc[0]
    if is_quantised(dtype):
        return (
            f"The reference's checkpoints are {compute}, as it computes: its weights "
            f"are {dtype}."
        )
    if dtype != "fp32":
        return f"The reference's checkpoints are {dtype}, as its weights are."
    if compute == "fp32":
        return "The reference's checkpoints are fp32."
    return (
        f"The reference's checkpoints are fp32, although it computes in {compute}: its "
        f"weights are fp32. Against {compute} checkpoints see {compute} weights."
    )
