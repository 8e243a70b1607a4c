"""The table of methods: which function makes each, which options it uses, what it has.

The data is `methods.toml`, which the reports read as well.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meft_bench.shared import tables
from meft_bench.shared.cell import Cell
from meft_bench.shared.field_kinds import (
    COLOR,
    FLAG,
    TABLE_NAME,
    TEXT,
    FieldKind,
    object_in,
    one_of,
    some_of,
    values_of,
)

FUNCTIONS = "meft_bench.child.methods"
"""Package of the functions."""


_OF_THE_USER = ""
_LEAVE_BLOCKS = (_OF_THE_USER, "full:full", "full:head", "lora:lora")
"""Functions of methods that change parameters, or modules inside of blocks, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way of fine-tuning."""

    function: str
    """`FILE:NAME` in `FUNCTIONS`."""
    options: tuple[str, ...] = ()
    """Fields of a cell that only some methods use, of those that this one uses."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of options where none is given, if they are not those of `Cell`."""
    streams: str = ""
    """Arithmetic of a reversible method's streams: `float` or `integer`."""
    twin_of: str = ""
    """Of a plain twin, which stores activations: the method that rebuilds them."""
    neurons: str = ""
    """Of adapters with many neurons: `dense`, `sparse` or `experts`."""
    has_rows: bool = False
    """Whether neurons are rows of a store, which `meft.SparseAdamW` updates."""
    trains_backbone: bool = False
    """Whether it trains the weights of the backbone."""
    floats_only: bool = False
    """Whether its layers take no weights of the backbone that are quantised."""
    kind: str
    """`exact`, or `approximation`: how its updates relate to the gradient of the loss.

    It is empty for a method of the user.
    """
    package: str = ""
    """Name of the package that implements it; empty if this project does."""
    optimizer: str = ""
    """Of a method with updates of its own: `FILE:NAME` of what makes its optimizer."""
    parallel: tuple[str, ...] = ()
    """Ways in which several ranks can train it: `ddp`, `fsdp2`."""

    @property
    def is_reversible(self) -> bool:
        """Whether it has two streams, rebuilt or stored."""
        return bool(self.streams)

    @property
    def leaves_blocks(self) -> bool:
        """Whether blocks stay as they are, and their MLPs can be split afterwards."""
        return self.function in _LEAVE_BLOCKS

    @property
    def rebuilds(self) -> bool:
        """Whether its backward pass rebuilds activations."""
        return self.is_reversible and not self.twin_of


_FOR_REPORTS: dict[str, FieldKind] = {
    "float_of": TABLE_NAME,
    "color": COLOR,
    "marker": one_of([*"ov^<>8spP*hHDdX"]),
    "line": one_of(["-", "--", "-.", ":"]),
    "hollow": FLAG,
}
_SCHEMA = _FOR_REPORTS | {
    "function": object_in(Path(__file__).parents[1] / "child" / "methods"),
    "options": some_of([one.name for one in dataclasses.fields(Cell)]),
    "defaults": values_of({one.name: one.type for one in dataclasses.fields(Cell)}),
    "streams": one_of(["float", "integer"]),
    "twin_of": TABLE_NAME,
    "neurons": one_of(["dense", "sparse", "experts"]),
    "has_rows": FLAG,
    "trains_backbone": FLAG,
    "floats_only": FLAG,
    "kind": one_of(["exact", "approximation"]),
    "package": TEXT,
    "optimizer": object_in(Path(__file__).parents[1] / "child" / "methods"),
    "parallel": some_of(["ddp", "fsdp2"]),
}


def _read() -> dict[str, Method]:
    methods = {}
    for name, table in tables.read(
        tables.METHODS, ["function", "kind"], _SCHEMA
    ).items():
        fields = {key: v for key, v in table.items() if key not in _FOR_REPORTS}
        for several in ("options", "parallel"):
            fields[several] = tuple(fields.get(several, ()))
        methods[name] = Method(**fields)
        if not methods[name].defaults.keys() <= {*methods[name].options}:
            raise tables.wrong_value(
                tables.METHODS,
                name,
                "defaults",
                methods[name].defaults,
                "values of options of the method",
            )
    return methods


TABLE = _read()
"""Every method by name, in the order of the file."""


_OWN = Method(
    function=_OF_THE_USER, options=("mlp_chunks",), kind="", parallel=("ddp",)
)


def of(name: str) -> Method:
    """Return a method of the table, or for one of the user what is known of it."""
    return TABLE.get(name, _OWN)


def with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a cell, with defaults of its method where none is given.

    Args:
        fields: values by the names of fields of `Cell`; one is the `method`.
    """
    method = TABLE.get(fields["method"])
    return fields if method is None else {**method.defaults, **fields}
