"""Descriptions of rows: panel titles, table titles, rows with options.

They contain the fields that differ, and those that are always shown. Predictions and
random weights are always mentioned.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd

from meft_reports.format import format_bytes, is_null
from meft_reports.summary import OPTIONS, PROVENANCE, WORKLOAD, varying
from meft_reports.text import plural

USUAL = {
    "weights_dtype": "fp32",
    "attention": "sdpa",
    "blocks": "eager",
    "ranks": 1,
    "parallel": "ddp",
}
"""Values that are omitted unless other values occur as well."""
_FLOATS = ("fp32", "bf16", "fp16")


def is_quantised(weights_dtype: str) -> bool:
    """Return whether weights of this dtype are quantised, not floats."""
    return weights_dtype not in _FLOATS


def describe(rows: pd.DataFrame, shown: Collection[str]) -> str:
    """Return a description of rows, e.g. `sst2 · minilm-l6 · bf16 · batch 16`.

    Predictions and random weights are always mentioned.

    Args:
        rows: rows that agree in the fields `shown`.
        shown: names of fields.
    """
    words: dict[str, Callable[[Any], str]] = {
        "depth": lambda depth: f"depth {depth}" if depth else "own depth",
        "weights_dtype": lambda dtype: f"{dtype} weights",
        "attention": lambda kernel: f"{kernel} attention",
        "blocks": lambda kind: f"{kind} blocks",
        "ranks": lambda count: plural(int(count), "rank"),
        "batch_size": lambda size: f"batch {size}",
        "seq_len": lambda length: f"{length} tokens",
        "code_sha256": lambda digest: f"code {digest[:8]}",
        "weights_sha256": lambda digest: f"weights {digest[:8]}",
        "torch_version": lambda version: f"torch {version}",
        "num_threads": lambda count: f"{count} threads",
        "num_slots": lambda count: f"{count} cells at a time",
    }
    first = rows.iloc[0]
    parts = [words.get(n, str)(first[n]) for n in shown if not is_null(first[n])]
    virtual = sorted({d for d in rows["device"] if d.startswith("virtual-")})
    if virtual:
        parts.append("predicted" if "device" in shown else f"predicted, {virtual[0]}")
    if rows["random_weights"].any():
        parts.append("random weights")
    return " · ".join(parts)


def fields_to_show(frame: pd.DataFrame, always: Sequence[str]) -> list[str]:
    """Return the fields that titles must show: `always`, and those that differ.

    Fields of `USUAL` that have their usual value in all rows are omitted.

    Args:
        frame: the rows.
        always: names of fields.
    """
    differing = varying(frame, (*WORKLOAD, *PROVENANCE))
    if frame.groupby("backbone")["weights_sha256"].nunique().max() < 2:
        # That backbones have weights of their own goes without saying.
        differing = [name for name in differing if name != "weights_sha256"]
    unusual = [name for name, usual in USUAL.items() if (frame[name] != usual).any()]
    usual = USUAL.keys() - {*differing, *unusual}
    shown = ({*always} | {*differing, *unusual}) - usual
    return [n for n in (*WORKLOAD, *PROVENANCE) if n in shown]


def option_label(
    row: "pd.Series[Any]", siblings: pd.DataFrame, ignoring: Sequence[str] = ()
) -> str:
    """Return the options in which a row differs from others of its method, else "".

    Args:
        row: the row.
        siblings: all rows of the table or panel.
        ignoring: options that are shown elsewhere, or have no effect.
    """
    same = siblings[siblings["method"] == row["method"]]
    differing = [n for n in varying(same, OPTIONS) if n not in ignoring]
    names = {
        "lost_bits": "k",
        "reversible_blocks": "rebuilt",
        "row_budget_bytes": "budget",
    }
    return ", ".join(f"{names.get(n, n)}={_short(n, row[n])}" for n in differing)


def _short(name: str, value: Any) -> str:
    if name == "reversible_blocks" and value == 0:
        return "all"
    if name.endswith("_bytes") and not is_null(value):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"
