"""The table of methods: which function makes each, which options it uses, what it has.

The data is `methods.toml`, which the reports read as well.
"""

import dataclasses
from dataclasses import dataclass

from meft_bench.shared import tables
from meft_bench.shared.tables import TableError

FUNCTIONS = "meft_bench.child.methods"
"""Package of the functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way of fine-tuning."""

    function: str
    """`FILE:NAME` in `FUNCTIONS`."""
    options: tuple[str, ...] = ()
    """Fields of a cell that only some methods use, of those that this one uses."""
    streams: str = ""
    """Arithmetic of a reversible method's streams: `float` or `integer`."""
    twin_of: str = ""
    """Of a plain twin, which stores activations: the method that rebuilds them."""
    neurons: str = ""
    """Of adapters with many neurons: `dense`, `sparse` or `experts`."""
    has_rows: bool = False
    """Whether neurons are rows of a store, which `meft.SparseAdamW` updates."""

    @property
    def is_reversible(self) -> bool:
        """Whether it has two streams, rebuilt or stored."""
        return bool(self.streams)

    @property
    def rebuilds(self) -> bool:
        """Whether its backward pass rebuilds activations."""
        return self.is_reversible and not self.twin_of


_FOR_REPORTS = ("float_of", "color", "marker", "line", "hollow")


def _read() -> dict[str, Method]:
    known = {*(field.name for field in dataclasses.fields(Method)), *_FOR_REPORTS}
    methods = {}
    for name, table in tables.read(tables.METHODS, "function", known).items():
        fields = {key: v for key, v in table.items() if key not in _FOR_REPORTS}
        fields["options"] = tuple(fields.get("options", ()))
        methods[name] = Method(**fields)
    for name, method in methods.items():
        where = f"{tables.METHODS}: [{name}]"
        if method.twin_of and method.twin_of not in methods:
            raise TableError(f"{where}: no method {method.twin_of!r}")
        if method.streams not in ("", "float", "integer"):
            raise TableError(f"{where}: streams are `float` or `integer`")
        if ":" not in method.function:
            raise TableError(f"{where}: `function` is written FILE:NAME")
    return methods


TABLE = _read()
"""Every method by name, in the order of the file."""
