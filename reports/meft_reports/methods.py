"""The table of methods: what each has, which options it uses, how it is drawn.

The data is `methods.toml`, which the harness reads as well. A method that is not in it
uses all options and is neither reversible nor an adapter of many neurons.
"""

import functools
from dataclasses import dataclass

from meft_reports.columns import CELL_FIELDS
from meft_reports.data_files import METHODS, read_tables
from meft_reports.field_kinds import ANY, COLOR, FLAG, TABLE_NAME, one_of, some_of

REFERENCE = "adapters-checkpointing"
"""Reference of the exact methods: adapters whose blocks are checkpointed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way of fine-tuning; its fields are explained in `methods.toml`."""

    options: tuple[str, ...] = ()
    streams: str = ""
    twin_of: str = ""
    float_of: str = ""
    neurons: str = ""
    color: str = ""
    marker: str = ""
    line: str = "-"
    hollow: bool = False


_FOR_THE_HARNESS = {
    **{"function": ANY, "defaults": ANY},
    **{"has_rows": ANY, "trains_backbone": ANY, "floats_only": ANY},
    **{"kind": ANY, "package": ANY, "optimizer": ANY, "parallel": ANY},
}
_SCHEMA = _FOR_THE_HARNESS | {
    "options": some_of(CELL_FIELDS),
    "streams": one_of(["float", "integer"]),
    "twin_of": TABLE_NAME,
    "float_of": TABLE_NAME,
    "neurons": one_of(["dense", "sparse", "experts"]),
    "color": COLOR,
    "marker": one_of([*"ov^<>8spP*hHDdX"]),
    "line": one_of(["-", "--", "-.", ":"]),
    "hollow": FLAG,
}


def _read() -> dict[str, Method]:
    methods = {}
    required = ("color", "marker")
    for name, table in read_tables(METHODS, required=required, schema=_SCHEMA).items():
        fields = {key: v for key, v in table.items() if key not in _FOR_THE_HARNESS}
        fields["options"] = tuple(fields.get("options", ()))
        methods[name] = Method(**fields)
    return methods


TABLE = _read()
"""Every method by name, in the order in which methods are shown."""
_UNKNOWN = Method()


def _method(name: str) -> Method:
    return TABLE.get(name, _UNKNOWN)


def is_meft(method: str) -> bool:
    """Return whether the method has MEFT's two streams, rebuilt or stored."""
    return bool(_method(method).streams)


def is_exact(method: str) -> bool:
    """Return whether its streams are integers."""
    return _method(method).streams == "integer"


def is_stored(method: str) -> bool:
    """Return whether it is a plain twin, which stores what the method rebuilds."""
    return bool(_method(method).twin_of)


def rebuilt(method: str) -> str:
    """Return the method itself, given the method or its plain twin."""
    return _method(method).twin_of or method


def in_floats(method: str) -> str:
    """Return the method of the same variant, rebuilt, in the paper's arithmetic."""
    return _method(method).float_of or rebuilt(method)


def is_sparse(method: str) -> bool:
    """Return whether few of its neurons are active, with rows in host memory."""
    return _method(method).neurons in ("sparse", "experts")


def has_experts(method: str) -> bool:
    """Return whether a router chooses among its neurons."""
    return _method(method).neurons == "experts"


def has_neurons(method: str) -> bool:
    """Return whether it is an adapter of many neurons parallel to the feed-forward."""
    return bool(_method(method).neurons)


@functools.cache
def _options() -> frozenset[str]:
    return frozenset(option for m in TABLE.values() for option in m.options)


def uses(method: str, option: str) -> bool:
    """Return whether `option` of a cell changes anything in `method`."""
    if method not in TABLE or option not in _options():
        return True
    return option in TABLE[method].options
