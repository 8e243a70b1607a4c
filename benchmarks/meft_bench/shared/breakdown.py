"""What a peak of memory consists of, in the compact form that a record keeps.

    {"peak_bytes": 569459200, "at_op": 3892, "num_ops": 5315, "phase": "backward",
     "rows": [["saved", "forward", "bert.encoder.layer.*.output", "aten.addmm.default",
               "bfloat16", [8, 256, 768], BYTES, COUNT, FIRST_OP], ...],
     "other_bytes": 841216,
     "saved_bytes": 22447388, "saved_rows": [...], "saved_other_bytes": 0}

A row has the storages that were alive at the peak, or of `saved_rows` those that one
forward kept for its backward, which need not be at the peak. They agree in kind, phase,
module, operator, dtype and shape. Numbers in the names of modules are `*`, so that all
blocks of a model share their rows. The rows are the largest ones, and with
`other_bytes` they add up to `peak_bytes`; so do those of what was saved. Operators are
counted from the beginning of the step. Of what is there between two steps, such as
parameters, phase and operator are empty.
"""

from typing import Any

from meft_bench.shared import json_types

FIELDS: dict[str, Any] = {
    "peak_bytes": int,
    "at_op": int,
    "num_ops": int,
    "phase": str,
    "rows": list[list[Any]],
    "other_bytes": int,
    "saved_bytes": int,
    "saved_rows": list[list[Any]],
    "saved_other_bytes": int,
}
SUMS = {
    "peak_bytes": ("rows", "other_bytes"),
    "saved_bytes": ("saved_rows", "saved_other_bytes"),
}
"""Sums, with the rows and the rest of which they consist."""
ROW: dict[str, Any] = {
    "kind": str,
    "phase": str,
    "module": str,
    "operator": str,
    "dtype": str,
    "shape": list[int],
    "num_bytes": int,
    "count": int,
    "first_op": int,
}
"""The entries of a row, in order, with their types."""


def check(value: Any) -> None:
    """Raise `ValueError` unless a value of JSON is a breakdown."""
    if not isinstance(value, dict) or value.keys() != FIELDS.keys():
        raise ValueError(f"a breakdown of memory has the fields {', '.join(FIELDS)}")
    json_types.check(value, FIELDS)
    for name, (rows, other) in SUMS.items():
        for row in value[rows]:
            if len(row) != len(ROW):
                entries = ", ".join(ROW)
                raise ValueError(f"a row of a breakdown has the entries {entries}")
        columns = dict(zip(ROW, zip(*value[rows], strict=True), strict=False))
        for entry, values in columns.items():
            # All of a column at a time: a record has hundreds of rows.
            if not json_types.all_fit(values, ROW[entry]):
                for each in values:
                    json_types.check({entry: each}, ROW)
        total = sum(columns.get("num_bytes", ())) + value[other]
        if total != value[name]:
            raise ValueError(
                f"the `{rows}` of a breakdown add up to {total} bytes, and its "
                f"`{name}` is {value[name]}"
            )
