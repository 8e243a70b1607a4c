"""Tables of the frame, as Markdown or HTML: results, memory, errors, failures, origin.

A table is text already formatted for people, so both outputs say the same. Averages
come with their spread and count, cells that failed stand where their number would have
been, and random weights are said in every table in which they occur.
"""

import html
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from meft_reports.errors import UnknownName
from meft_reports.format import (
    NOTHING,
    format_bytes,
    format_bytes_spread,
    format_count,
    format_error,
    format_percent,
    format_score,
    format_seconds,
    format_text,
    is_null,
)
from meft_reports.labels import describe, fields_to_show, option_label
from meft_reports.summary import (
    OPTIONS,
    PROVENANCE,
    WORKLOAD,
    by_method,
    has_random_weights,
    split,
    summarise,
    with_blocks_known,
    with_torch_known,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A heading, a header, rows of text, and what a reader must know about them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    """Columns from the left that hold text; the others hold numbers."""
    notes: tuple[str, ...] = ()


def to_markdown(table: Table) -> str:
    """The table as GitHub Markdown."""

    def line(cells: Iterable[str]) -> str:
        escaped = (c.replace("\\", "\\\\").replace("|", "\\|") for c in cells)
        return "| " + " | ".join(" ".join(c.split()) for c in escaped) + " |"

    rules = [
        "---" if index < table.num_text_columns else "---:"
        for index in range(len(table.header))
    ]
    lines = [f"### {table.title}", "", line(table.header), line(rules)]
    lines += [line(row) for row in table.rows]
    lines += [f"\n{note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def to_html(table: Table) -> str:
    """The table as an HTML `<table>`, every value escaped."""

    def line(cells: Iterable[str], tag: str) -> str:
        parts = []
        for index, cell in enumerate(cells):
            kind = "text" if index < table.num_text_columns else "number"
            row_head = index == 0 and tag == "td"
            name = 'th scope="row"' if row_head else tag
            end = "th" if row_head else tag
            parts.append(f'<{name} class="{kind}">{html.escape(cell)}</{end}>')
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(line(row, "td") for row in table.rows)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption>\n'
        f"<thead>{line(table.header, 'th')}</thead>\n<tbody>{body}</tbody>"
        f"</table></div>{notes}"
    )


def results(frame: pd.DataFrame) -> list[Table]:
    """What each method reached on each real task, and what it cost; over seeds."""
    rows = frame[frame["task"] != "synthetic"]
    if rows.empty:
        return []
    values = [
        "score",
        "majority_score",
        "second_score",
        "second_majority_score",
        "num_trainable_parameters",
        "trainable_fraction",
        "saved_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "resting_bytes",
        "peak_host_bytes",
        "step_seconds",
        "step_seconds_iqr",
    ]
    table = summarise(rows, values)
    shown = fields_to_show(table, always=WORKLOAD)
    names = ["score_name", "second_score_name"]
    metrics = rows.groupby("task")[names].first()
    return [
        _results_table(part, describe(part, shown), *metrics.loc[key["task"], names])
        for key, part in split(table, [*WORKLOAD, *PROVENANCE])
    ]


def _results_table(
    part: pd.DataFrame, title: str, metric: Any, second_metric: Any
) -> Table:
    part = by_method(part)
    header: dict[str, Callable[[Any], str]] = {
        "method": lambda row: _join(row["method"], option_label(row, part)),
        "seeds": _seeds,
        f"score ({format_text(metric)})": lambda row: _score(row, "score"),
        "majority class": lambda row: format_score(row["majority_score"]),
        f"score ({format_text(second_metric)})": lambda row: _score(
            row, "second_score"
        ),
        "majority class, same": lambda row: format_score(row["second_majority_score"]),
        "trainable": lambda row: format_count(row["num_trainable_parameters"]),
        "share": lambda row: format_percent(row["trainable_fraction"]),
        "saved for backward": lambda row: _bytes(row, "saved_bytes"),
        "peak allocated": lambda row: _bytes(row, "peak_allocated_bytes"),
        "peak reserved": lambda row: _bytes(row, "peak_reserved_bytes"),
        "resting": lambda row: _bytes(row, "resting_bytes"),
        "host peak": lambda row: _bytes(row, "peak_host_bytes"),
        "step, median (IQR)": _step,
    }
    if part["peak_reserved_bytes"].isna().all():  # only a GPU has it
        del header["peak reserved"]
    if is_null(second_metric):
        del header[f"score ({format_text(second_metric)})"]
        del header["majority class, same"]
    return Table(
        title=title,
        header=tuple(header),
        rows=tuple(
            tuple(cell(row) for cell in header.values()) for _, row in part.iterrows()
        ),
        notes=(
            "All numbers are measured. Mean over seeds ± sample standard deviation.",
            *_random_note(part),
        ),
    )


def _seeds(row: "pd.Series[Any]") -> str:
    total = row["num_seeds"] + row["num_failed"]
    if not row["num_failed"]:
        return str(total)
    return f"{row['num_seeds']} of {total} ({row['num_failed']} failed)"


def _score(row: "pd.Series[Any]", name: str) -> str:
    spread = row[f"{name}_spread"]
    text = format_score(row[name])
    return text if is_null(spread) else f"{text} ± {format_score(spread)}"


def _bytes(row: "pd.Series[Any]", name: str) -> str:
    return format_bytes_spread(row[name], row[f"{name}_spread"])


def _step(row: "pd.Series[Any]") -> str:
    if is_null(row["step_seconds"]):
        return NOTHING
    iqr = format_seconds(row["step_seconds_iqr"])
    return f"{format_seconds(row['step_seconds'])} ({iqr})"


MEMORY_TITLES = {
    "saved_bytes": "Saved for backward",
    "peak_allocated_bytes": "Peak allocated",
    "resting_bytes": "Resting",
    "peak_host_bytes": "Host peak",
    "step_seconds": "Step (median)",
}


def memory(frame: pd.DataFrame) -> list[Table]:
    """Methods down, shapes across: one table per quantity, backbone and dtype."""
    rows = with_torch_known(frame[frame["task"] == "synthetic"])
    if rows.empty:
        return []
    rows["random_weights"] = has_random_weights(rows)
    rows = with_blocks_known(rows)
    fixed = [n for n in (*WORKLOAD, *PROVENANCE) if n not in ("batch_size", "depth")]
    shown = fields_to_show(rows, always=("backbone", "dtype", "seq_len", "device"))
    shown = [name for name in shown if name in fixed]
    return [
        _memory_table(part, quantity, f"{words} · {describe(part, shown)}")
        for _, part in split(rows, fixed)
        for quantity, words in MEMORY_TITLES.items()
        if part[quantity].notna().any()
    ]


def _memory_table(part: pd.DataFrame, quantity: str, title: str) -> Table:
    shapes = {
        _shape(cells): cells for _, cells in split(part, ["num_blocks", "batch_size"])
    }
    rows = []
    for _, same in by_method(part).groupby(["method", *OPTIONS], sort=False):
        first = same.iloc[0]
        here = {
            _shape(cells): cells
            for _, cells in split(same, ["num_blocks", "batch_size"])
        }
        cells = [_memory_cell(here.get(shape), quantity) for shape in shapes]
        rows.append((_join(first["method"], option_label(first, part)), *cells))
    return Table(
        title=title,
        header=("method", *shapes),
        rows=tuple(rows),
        notes=(
            "Measured on random tokens of exact shape, the mean where there are "
            "several seeds. A word instead of a number is how that cell failed.",
            *_random_note(part),
        ),
    )


def _shape(cells: pd.DataFrame) -> str:
    blocks, batch = cells["num_blocks"].iloc[0], cells["batch_size"].iloc[0]
    depth = "own depth" if is_null(blocks) else f"{blocks} blocks"
    return f"{depth}, batch {batch}"


def _memory_cell(cells: pd.DataFrame | None, quantity: str) -> str:
    if cells is None:
        return NOTHING
    format = format_seconds if quantity == "step_seconds" else format_bytes
    values = cells.loc[cells["status"] == "ok", quantity].dropna()
    failed = cells.loc[cells["status"] != "ok", "status"].tolist()
    mean = [format(float(values.mean()))] if len(values) else []
    return ", ".join([*mean, *failed]) or NOTHING


def exactness(frame: pd.DataFrame) -> list[Table]:
    """How exact the rebuilt backward is: the worst of every block and seed."""
    ok = with_torch_known(frame[frame["status"] == "ok"])
    ok["random_weights"] = has_random_weights(ok)
    known = ok["reconstruction_error"].notna() | ok["gradient_error"].notna()
    rows = by_method(ok[known])
    if rows.empty:
        return []
    shown = fields_to_show(rows, always=("task", "backbone", "dtype"))
    cells = []
    for _, part in split(rows, [*WORKLOAD, *PROVENANCE]):
        for _, same in by_method(part).groupby(["method", *OPTIONS], sort=False):
            first = same.iloc[0]
            cells.append(
                (
                    _join(first["method"], option_label(first, part)),
                    describe(same, shown),
                    format_count(same["num_blocks"].max()),
                    format_error(_worst(same["reconstruction_error"])),
                    format_error(_worst(same["gradient_error"])),
                    _blocks_kept(same["gradient_error"]),
                    str(len(same)),
                )
            )
    header = (
        "method",
        "workload",
        "blocks",
        "worst reconstruction error",
        "worst gradient error",
        "blocks with gradient error below 1 %",
        "cells",
    )
    return [
        Table(
            title="Exactness of the rebuilt backward",
            header=header,
            rows=tuple(cells),
            num_text_columns=2,
            notes=("Relative errors, measured; the greatest over blocks and seeds.",),
        )
    ]


def _worst(lists: "pd.Series[Any]") -> float | None:
    values = [value for errors in lists.dropna() for value in errors]
    # max() of a list with NaN depends on the order; a NaN is the worst there is.
    broken = [value for value in values if value != value]
    return float("nan") if broken else max(values, default=None)


def _blocks_kept(lists: "pd.Series[Any]") -> str:
    counts = {(sum(e < 0.01 for e in errors), len(errors)) for errors in lists.dropna()}
    return ", ".join(f"{kept} of {total}" for kept, total in sorted(counts)) or NOTHING


def failures(frame: pd.DataFrame) -> list[Table]:
    """Every cell that did not end well, and why."""
    failed = by_method(frame[frame["status"] != "ok"])
    random = has_random_weights(failed)
    rows = tuple(
        (
            f"{row['cell_id']} (random weights)" if is_random else row["cell_id"],
            row["status"],
            format_text(row["message"]),
            format_seconds(row["wall_seconds"]),
        )
        for (_, row), is_random in zip(failed.iterrows(), random, strict=True)
    )
    if not rows:
        return []
    return [
        Table(
            title="Cells that did not end well",
            header=("cell", "status", "message", "after"),
            rows=rows,
            num_text_columns=3,
        )
    ]


def environment(frame: pd.DataFrame) -> list[Table]:
    """Where the cells ran: one table per distinct place and code."""
    fields = {
        "machine": "machine",
        "cpu": "processor",
        "device_name": "accelerator",
        "platform": "platform",
        "num_threads": "threads per cell",
        "num_slots": "cells side by side",
        "commit": "commit",
        "dirty": "tracked files changed since",
        "code_sha256": "digest of the code that ran",
    }
    parts = list(split(with_torch_known(frame), [*fields, "versions"]))
    tables = []
    for number, (key, part) in enumerate(parts, start=1):
        rows = [(words, _fact(key[name])) for name, words in fields.items()]
        rows += sorted(json.loads(key["versions"]).items())
        cells = "1 cell" if len(part) == 1 else f"{len(part)} cells"
        place = f" {number} of {len(parts)}" if len(parts) > 1 else ""
        tables.append(
            Table(
                title=f"Environment{place} ({cells})",
                header=("fact", "value"),
                rows=tuple(rows),
                num_text_columns=2,
            )
        )
    return tables


def origins(frame: pd.DataFrame) -> list[Table]:
    """Where the weights and the rows came from."""
    random = has_random_weights(frame)
    named = frame.assign(
        weights_origin=frame["weights_origin"].where(~random, "random weights")
    )
    weights = split(named, ["backbone", "weights_origin", "weights_sha256"])
    rows = [
        (*map(_fact, key.values()), format_count(len(part))) for key, part in weights
    ]
    ok = frame[(frame["status"] == "ok") & (frame["task"] != "synthetic")]
    fields = ["task", "data_origin", "num_train_rows", "num_eval_rows"]
    data = [
        (*map(_fact, key.values()), format_count(len(part)))
        for key, part in split(ok, fields)
    ]
    return [
        Table(
            title="Weights",
            header=("backbone", "origin", "sha256", "cells"),
            rows=tuple(rows),
            num_text_columns=3,
        ),
        Table(
            title="Data",
            header=(
                "task",
                "origin and splits",
                "rows trained on",
                "scored on",
                "cells",
            ),
            rows=tuple(data),
            num_text_columns=2,
        ),
    ]


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOTHING if is_null(value) else str(value)


def _join(name: str, options: str) -> str:
    return f"{name} ({options})" if options else name


def _random_note(rows: pd.DataFrame) -> list[str]:
    if not rows["random_weights"].any():
        return []
    return ["Random weights: sizes and times only, a score would mean nothing."]


TABLES: dict[str, Callable[[pd.DataFrame], list[Table]]] = {
    "results": results,
    "memory": memory,
    "exactness": exactness,
    "failures": failures,
    "environment": environment,
    "origins": origins,
}
"""Every kind of table by name; each may be several tables, or none."""


def find_tables(name: str) -> Callable[[pd.DataFrame], list[Table]]:
    """The function that makes the tables called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in TABLES:
        raise UnknownName("table", name, TABLES)
    return TABLES[name]
